"""Plain gradient descent."""

from __future__ import annotations

import torch
from torch import nn

from metahpo.functional.trees import Params
from metahpo.inner.rules.base import RuleState, UpdateRule


class SGD(UpdateRule):
    """w <- w - lr * gradient: the inner rule of MAML (Finn et al. 2017, equation 1).

    lr: the rate of every tensor and step. learnable: whether the outer loop learns it.
    """

    def __init__(self, lr: float, *, learnable: bool = False):
        super().__init__()
        self.lr = nn.Parameter(torch.tensor(float(lr)), requires_grad=learnable)

    def forward(self, params: Params, grads: Params, state: RuleState, step: int) -> tuple[Params, RuleState]:
        return {name: p - self.lr * grads[name] for name, p in params.items()}, state
