"""The Levenberg-Marquardt method."""

from __future__ import annotations

import torch
from torch import Tensor

from metahpo.checks import check_number
from metahpo.errors import NetArgumentError
from metahpo.functional.trees import Params
from metahpo.inner.gradient import StepLoss
from metahpo.inner.linear_solve import ConjugateGradients
from metahpo.inner.rules.base import RuleState
from metahpo.inner.rules.curvature import CurvatureRule, flat, split
from metahpo.inner.rules.gauss_newton import Criterion, Outputs, checked_parts, gauss_newton_product


class LevenbergMarquardt(CurvatureRule):
    """w <- w - d, d = (J^T C J + m * damping * I)^-1 g as ``GaussNewton``, where the step lowers the loss; else w stays
    (Marquardt 1963; Nocedal and Wright 2006, section 10.3, with the ratio test of algorithm 4.1).

    The factor m is the state, 1 at first: it is multiplied by ``up`` where the loss fell by less than a quarter of what
    the quadratic model predicts, and by ``down`` where by more than three quarters.

    outputs, criterion, solver: as ``GaussNewton``. damping: the initial one, a hyperparameter; learnable: whether the
    outer loop learns it. up, down: constants, at least 1 and at most 1. An outer gradient takes the choices of every
    step as they fell.
    """

    damping: Tensor

    def __init__(
        self,
        outputs: Outputs,
        criterion: Criterion,
        damping: float = 1e-2,
        *,
        up: float = 4.0,
        down: float = 0.25,
        solver: ConjugateGradients = ConjugateGradients(),
        learnable: bool = False,
    ):
        super().__init__(solver)
        self.outputs, self.criterion = checked_parts(self, outputs, criterion)
        self.up = check_number(self, "up", up, at_least=1, error=NetArgumentError)
        self.down = check_number(self, "down", down, above=0, at_most=1, error=NetArgumentError)
        self.add_scalars(learnable, damping=damping)

    def init(self, params: Params) -> RuleState:
        return {"factor": next(iter(params.values())).new_ones(())}

    def product(self, params: Params, direction: Params, loss: StepLoss) -> Params:
        return gauss_newton_product(self.outputs, self.criterion, params, direction, loss.batch)

    def forward(  # type: ignore[override]
        self, params: Params, grads: Params, state: RuleState, step: int, loss: StepLoss
    ) -> tuple[Params, RuleState]:
        factor = state["factor"]
        damping = factor * self.damping
        change = self.direction(params, grads, damping, loss)
        parts = split(change, params)
        new = {name: p - parts[name] for name, p in params.items()}
        # The model's fall g.d - d.(C d)/2, as (C + damping) d = g.
        predicted = (change @ flat(grads, params) + damping * (change @ change)) / 2
        # False for a loss that is not finite.
        fell = (loss(params) - loss(new)).detach()
        better, good, poor = fell > 0, fell > 0.75 * predicted, ~(fell >= 0.25 * predicted)
        factor = torch.where(good, self.down * factor, torch.where(poor, self.up * factor, factor))
        return {name: torch.where(better, new[name], p) for name, p in params.items()}, {"factor": factor}
