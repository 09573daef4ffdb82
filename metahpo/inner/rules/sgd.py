"""Gradient descent, with momentum and weight decay."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metahpo.checks import check_flag
from metahpo.errors import NetArgumentError
from metahpo.inner.rules.base import Hyper, PerTensorRule, decayed


class SGD(PerTensorRule):
    """w <- w - lr * gradient (the inner rule of MAML, Finn et al. 2017, equation 1); with momentum, dampening, weight
    decay and Nesterov's momentum (Sutskever et al. 2013, section 2) as ``torch.optim.SGD``.

    lr, momentum, dampening, weight_decay: hyperparameters; of the last three one that is None is absent (as 0, and not
    learnt).
    learnable: whether the outer loop learns them. Raises NetError for dampening or nesterov without momentum, or both.
    """

    def __init__(
        self,
        lr: float,
        momentum: float | None = None,
        dampening: float | None = None,
        weight_decay: float | None = None,
        nesterov: bool = False,
        *,
        learnable: bool = False,
    ):
        super().__init__()
        nesterov = check_flag(self, "nesterov", nesterov, error=NetArgumentError)
        if momentum is None and (nesterov or dampening is not None):
            raise NetArgumentError(f"SGD: {'nesterov' if nesterov else 'dampening'} needs a momentum, found None")
        if nesterov and dampening is not None:
            raise NetArgumentError(f"SGD: nesterov goes without dampening, found {dampening}")
        self.nesterov = nesterov
        self._has_momentum = momentum is not None
        self.add_scalars(learnable, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay)

    def tensor_state(self, param: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(param)} if self._has_momentum else {}

    def update(
        self, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int, hyper: Hyper
    ) -> tuple[Tensor, dict[str, Tensor]]:
        grad = decayed(param, grad, hyper)
        if not self._has_momentum:
            return param - hyper["lr"] * grad, {}
        # The first step is not dampened.
        dampening = hyper.get("dampening") if step else None
        added = grad if dampening is None else (1 - dampening) * grad
        buffer = hyper["momentum"] * state["momentum"] + added
        direction = grad + hyper["momentum"] * buffer if self.nesterov else buffer
        return param - hyper["lr"] * direction, {"momentum": buffer}
