"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metahpo.checks import check_flag
from metahpo.errors import NetArgumentError
from metahpo.inner.rules.base import Hyper, PerTensorRule, decayed, root


class Adam(PerTensorRule):
    """Steps by the averages of gradient and squared gradient, both corrected for their start at zero (Kingma and Ba
    2015, algorithm 1), as ``torch.optim.Adam``.

    lr, beta1, beta2 (of the averages, below 1), eps, weight_decay (an L2 term of the loss; None: absent, as 0):
    hyperparameters. amsgrad: the largest average of the squares so far in place of the last (Reddi et al. 2018,
    algorithm 2). learnable: whether the outer loop learns the hyperparameters.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float | None = None,
        amsgrad: bool = False,
        *,
        learnable: bool = False,
    ):
        super().__init__()
        self.amsgrad = check_flag(self, "amsgrad", amsgrad, error=NetArgumentError)
        self.add_scalars(learnable, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)

    def tensor_state(self, param: Tensor) -> dict[str, Tensor]:
        names = ["mean", "square", *(["largest"] if self.amsgrad else [])]
        return {name: torch.zeros_like(param) for name in names}

    def update(
        self, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int, hyper: Hyper
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self._step(param, decayed(param, grad, hyper), state, step, hyper)

    def _step(
        self, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int, hyper: Hyper
    ) -> tuple[Tensor, dict[str, Tensor]]:
        beta1, beta2 = hyper["beta1"], hyper["beta2"]
        new = {
            "mean": beta1 * state["mean"] + (1 - beta1) * grad,
            "square": beta2 * state["square"] + (1 - beta2) * (grad * grad),
        }
        square = new["square"]
        if self.amsgrad:
            square = new["largest"] = torch.maximum(state["largest"], square)
        size = hyper["lr"] / (1 - beta1 ** (step + 1))
        scale = (1 - beta2 ** (step + 1)).sqrt()
        return param - size * (new["mean"] / (root(square) / scale + hyper["eps"])), new


class AdamW(Adam):
    """Adam with the weight decay taken off the parameters, w <- (1 - lr * weight_decay) w, and not through the gradient
    (Loshchilov and Hutter 2019, algorithm 2), as ``torch.optim.AdamW``.

    Its hyperparameters and flags are Adam's.
    """

    decoupled_decay = True

    def __init__(
        self,
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float | None = 1e-2,
        amsgrad: bool = False,
        *,
        learnable: bool = False,
    ):
        super().__init__(lr, beta1, beta2, eps, weight_decay, amsgrad, learnable=learnable)

    def update(
        self, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int, hyper: Hyper
    ) -> tuple[Tensor, dict[str, Tensor]]:
        decay = hyper.get("weight_decay")
        if decay is not None:
            param = param * (1 - hyper["lr"] * decay)
        return self._step(param, grad, state, step, hyper)
