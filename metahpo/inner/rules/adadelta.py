"""Adadelta."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metahpo.inner.rules.base import Hyper, PerTensorRule, decayed, root


class Adadelta(PerTensorRule):
    """w <- w - lr * d, d = g * sqrt(average of d^2 + eps) / sqrt(average of g^2 + eps) (Zeiler 2012, algorithm 1), as
    ``torch.optim.Adadelta``.

    lr, rho (of both averages), eps, weight_decay: hyperparameters; one that is None is absent (as 0). learnable:
    whether the outer loop learns them.
    """

    def __init__(
        self,
        lr: float = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float | None = None,
        *,
        learnable: bool = False,
    ):
        super().__init__()
        self.add_scalars(learnable, lr=lr, rho=rho, eps=eps, weight_decay=weight_decay)

    def tensor_state(self, param: Tensor) -> dict[str, Tensor]:
        return {"square": torch.zeros_like(param), "change": torch.zeros_like(param)}

    def update(
        self, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int, hyper: Hyper
    ) -> tuple[Tensor, dict[str, Tensor]]:
        grad = decayed(param, grad, hyper)
        rho, eps = hyper["rho"], hyper["eps"]
        square = rho * state["square"] + (1 - rho) * (grad * grad)
        change = root(state["change"] + eps) / root(square + eps) * grad
        new = {"square": square, "change": rho * state["change"] + (1 - rho) * (change * change)}
        return param - hyper["lr"] * change, new
