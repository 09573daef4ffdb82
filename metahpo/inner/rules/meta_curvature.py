"""Gradients transformed by learnt matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metahpo.checks import check_flag, check_number
from metahpo.errors import NetArgumentError
from metahpo.functional.trees import Params
from metahpo.inner.rules.base import RuleState, UpdateRule, checked_params


class MetaCurvature(UpdateRule):
    """w <- w - lr * G x_1 M_out x_2 M_in x_3 M_f: the gradient of each tensor multiplied along its outputs, its inputs
    and its remaining (kernel) dimensions by learnt matrices, a Kronecker-factored curvature (Park and Oliva 2019,
    section 3, equation 7).

    params: the tensors to update; lr: the rate, fixed. The matrices begin as the identity, where the rule is gradient
    descent. ``matrices`` holds for each tensor one [n, n] by dimension of its [outputs, inputs, rest] that is above 1.
    """

    def __init__(self, params: Params, lr: float, *, learnable: bool = True):
        super().__init__()
        self.lr = check_number(self, "lr", lr, error=NetArgumentError)
        learnable = check_flag(self, "learnable", learnable, error=NetArgumentError)
        self.names = tuple(checked_params(self, params))
        self.matrices = nn.ModuleList(
            nn.ParameterList(
                nn.Parameter(torch.eye(size, dtype=p.dtype, device=p.device), learnable)
                for size in _sizes(p)
                if size > 1
            )
            for p in params.values()
        )

    def forward(self, params: Params, grads: Params, state: RuleState, step: int) -> tuple[Params, RuleState]:
        matrices = dict(zip(self.names, self.matrices))
        return {
            name: p - self.lr * _transformed(grads[name], iter(matrices[name])) for name, p in params.items()
        }, state


def _sizes(tensor: Tensor) -> tuple[int, int, int]:
    """Outputs, inputs and the product of the rest; a vector has outputs alone."""
    shape = (*tensor.shape, 1, 1)
    return shape[0], shape[1], max(tensor.numel(), 1) // max(shape[0] * shape[1], 1)


def _transformed(grad: Tensor, matrices) -> Tensor:
    outputs, inputs, rest = _sizes(grad)
    g = grad.reshape(outputs, inputs * rest)
    if outputs > 1:
        g = next(matrices) @ g
    g = g.view(outputs, inputs, rest)
    if inputs > 1:
        g = next(matrices) @ g
    if rest > 1:
        g = g @ next(matrices).mT
    return g.reshape(grad.shape)
