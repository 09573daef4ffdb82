"""Adagrad."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metahpo.checks import check_number
from metahpo.errors import NetArgumentError
from metahpo.inner.rules.base import Hyper, PerTensorRule, decayed, root


class Adagrad(PerTensorRule):
    """w <- w - lr / (1 + step * lr_decay) * g / (sqrt(sum of g^2) + eps) (Duchi et al. 2011, section 1.1, the diagonal
    form), as ``torch.optim.Adagrad``.

    lr, lr_decay, weight_decay, eps: hyperparameters; a decay that is None is absent (as 0). initial_accumulator_value:
    the sum before the first step, a constant. learnable: whether the outer loop learns the hyperparameters.
    """

    def __init__(
        self,
        lr: float = 1e-2,
        lr_decay: float | None = None,
        weight_decay: float | None = None,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        learnable: bool = False,
    ):
        super().__init__()
        start = check_number(
            self, "initial_accumulator_value", initial_accumulator_value, at_least=0, error=NetArgumentError
        )
        self.initial_accumulator_value = start
        self.add_scalars(learnable, lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, eps=eps)

    def tensor_state(self, param: Tensor) -> dict[str, Tensor]:
        return {"sum": torch.full_like(param, self.initial_accumulator_value)}

    def update(
        self, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int, hyper: Hyper
    ) -> tuple[Tensor, dict[str, Tensor]]:
        grad = decayed(param, grad, hyper)
        lr = hyper["lr"]
        if "lr_decay" in hyper:
            lr = lr / (1 + step * hyper["lr_decay"])
        total = state["sum"] + grad * grad
        return param - lr * (grad / (root(total) + hyper["eps"])), {"sum": total}
