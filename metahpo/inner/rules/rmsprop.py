"""RMSprop."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metahpo.checks import check_flag
from metahpo.errors import NetArgumentError
from metahpo.inner.rules.base import Hyper, PerTensorRule, decayed, root


class RMSprop(PerTensorRule):
    """w <- w - lr * g / (sqrt(average of g^2) + eps) (Tieleman and Hinton 2012, lecture 6.5), with momentum and,
    centred, the variance in place of the square (Graves 2013, equations 38 to 41), as ``torch.optim.RMSprop``.

    lr, alpha (of the averages), eps, weight_decay, momentum: hyperparameters; of the last two one that is None is
    absent (as 0). learnable: whether the outer loop learns them.
    """

    def __init__(
        self,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float | None = None,
        momentum: float | None = None,
        centered: bool = False,
        *,
        learnable: bool = False,
    ):
        super().__init__()
        self.centered = check_flag(self, "centered", centered, error=NetArgumentError)
        self._has_momentum = momentum is not None
        self.add_scalars(learnable, lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)

    def tensor_state(self, param: Tensor) -> dict[str, Tensor]:
        names = ["square", *(["mean"] if self.centered else []), *(["momentum"] if self._has_momentum else [])]
        return {name: torch.zeros_like(param) for name in names}

    def update(
        self, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int, hyper: Hyper
    ) -> tuple[Tensor, dict[str, Tensor]]:
        grad = decayed(param, grad, hyper)
        alpha = hyper["alpha"]
        new = {"square": alpha * state["square"] + (1 - alpha) * (grad * grad)}
        spread = new["square"]
        if self.centered:
            new["mean"] = alpha * state["mean"] + (1 - alpha) * grad
            spread = spread - new["mean"] * new["mean"]
        direction = grad / (root(spread) + hyper["eps"])
        if self._has_momentum:
            direction = new["momentum"] = hyper["momentum"] * state["momentum"] + direction
        return param - hyper["lr"] * direction, new
