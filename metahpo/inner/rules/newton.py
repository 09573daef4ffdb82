"""Newton's method."""

from __future__ import annotations

from torch import Tensor

from metahpo.functional.trees import Params
from metahpo.inner.gradient import StepLoss
from metahpo.inner.linear_solve import ConjugateGradients
from metahpo.inner.rules.base import RuleState
from metahpo.inner.rules.curvature import CurvatureRule, hessian_product, split


class Newton(CurvatureRule):
    """w <- w - lr * (H + damping * I)^-1 g, H the Hessian of the step's loss (Nocedal and Wright 2006, section 7.1), by
    conjugate gradients on Hessian-vector products: for small problems. H + damping * I should be positive definite.

    lr, damping: hyperparameters; learnable: whether the outer loop learns them. solver: as ``CurvatureRule``.
    """

    lr: Tensor
    damping: Tensor

    def __init__(
        self,
        lr: float = 1.0,
        damping: float = 0.0,
        *,
        solver: ConjugateGradients = ConjugateGradients(),
        learnable: bool = False,
    ):
        super().__init__(solver)
        self.add_scalars(learnable, lr=lr, damping=damping)

    def product(self, params: Params, direction: Params, loss: StepLoss) -> Params:
        return hessian_product(loss, params, direction)

    def forward(  # type: ignore[override]
        self, params: Params, grads: Params, state: RuleState, step: int, loss: StepLoss
    ) -> tuple[Params, RuleState]:
        change = split(self.lr * self.direction(params, grads, self.damping, loss), params)
        return {name: p - change[name] for name, p in params.items()}, state
