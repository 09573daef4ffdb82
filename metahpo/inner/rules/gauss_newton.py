"""The Gauss-Newton method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp

from metahpo.checks import check_callable
from metahpo.errors import NetArgumentError
from metahpo.functional.kernels import constants_without_tangents, forward_mode
from metahpo.functional.trees import Params
from metahpo.inner.gradient import StepLoss
from metahpo.inner.linear_solve import ConjugateGradients
from metahpo.inner.rules.curvature import CurvatureRule, hessian_product
from metahpo.inner.rules.newton import Newton

# (params, batch) -> outputs z, any shape; (z, batch) -> scalar.
Outputs = Callable[[Params, Any], Tensor]
Criterion = Callable[[Tensor, Any], Tensor]


class GaussNewton(Newton):
    """w <- w - lr * (J^T C J + damping * I)^-1 g, J the Jacobian of the outputs and C the Hessian of the criterion in
    the outputs (Schraudolph 2002, section 3.1; for a sum of squares Nocedal and Wright 2006, section 10.3), by
    conjugate gradients on products with J, C and J^T: for small problems.

    outputs, criterion: the step's loss should be ``criterion(outputs(params, batch), batch)``; a criterion convex in
    the outputs makes the matrix positive definite with any damping above 0. The rest is as ``Newton``. The outputs run
    in forward mode, which ``Newton`` needs of no layer.
    """

    def __init__(
        self,
        outputs: Outputs,
        criterion: Criterion,
        lr: float = 1.0,
        damping: float = 0.0,
        *,
        solver: ConjugateGradients = ConjugateGradients(),
        learnable: bool = False,
    ):
        super().__init__(lr, damping, solver=solver, learnable=learnable)
        self.outputs, self.criterion = checked_parts(self, outputs, criterion)

    def product(self, params: Params, direction: Params, loss: StepLoss) -> Params:
        return gauss_newton_product(self.outputs, self.criterion, params, direction, loss.batch)


def checked_parts(rule: CurvatureRule, outputs: Outputs, criterion: Criterion) -> tuple[Outputs, Criterion]:
    """Both, if they are functions; else NetArgumentError."""
    check_callable(rule, "outputs", outputs, "a function of params and batch", error=NetArgumentError)
    check_callable(rule, "criterion", criterion, "a function of outputs and batch", error=NetArgumentError)
    return outputs, criterion


def gauss_newton_product(
    outputs: Outputs, criterion: Criterion, params: Params, direction: Params, batch: Any
) -> Params:
    """J^T C J times ``direction``."""

    def watched(params: Params) -> Any:
        with constants_without_tangents():
            return outputs(params, batch)

    with forward_mode():
        z, change = jvp(watched, (params,), (direction,))  # type: ignore[misc]
    weight = hessian_product(lambda z: criterion(z, batch), z, change)
    return grad(lambda params: torch.sum(outputs(params, batch) * weight))(params)
