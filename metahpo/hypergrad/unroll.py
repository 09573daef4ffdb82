"""Hypergradients by differentiating through the unrolled inner training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from metahpo.checks import check_callable, check_whole, refuse
from metahpo.errors import HypergradientArgumentError
from metahpo.functional.trees import Params
from metahpo.hypergrad.base import (
    Hypergradient,
    InnerState,
    OuterLoss,
    check_inputs,
    collected,
    finished,
    leaves,
    outer_value,
    twice_differentiated,
)
from metahpo.inner.gradient import FirstOrder, InnerGradient, Reverse
from metahpo.inner.problem import InnerProblem, constants
from metahpo.inner.remat import NoRemat, Remat
from metahpo.inner.rules.base import UpdateRule

_FIRST_ORDER = "gradient=FirstOrder() (first_order)"


@dataclass(frozen=True)
class Unroll:
    """Reverse mode through every inner step (Maclaurin et al. 2015; Franceschi et al. 2017, section 3.1): exact.

    gradient: how the gradient of a step is differentiated; ``Mixed()`` keeps no activations. remat: what is computed
    again; ``Sqrt()`` keeps about 2 sqrt(T) states of T. truncate: differentiate the last so many steps alone (Shaban et
    al. 2019): the cost and memory of those, plus the plain training before; biased towards what pays off soon (Wu et
    al. 2018), the less the more strongly convex the loss, whose bias falls geometrically with the steps kept.

    Cost: 2 to 4 times the training, whatever the number of hyperparameters. Memory: T steps' activations with
    ``Reverse()``, T states with ``Mixed()``, sqrt(T) of them with ``Sqrt()`` too. The one to take for up to some
    thousands of steps and any number of hyperparameters.
    """

    gradient: InnerGradient = Reverse()
    remat: Remat = NoRemat()
    truncate: int | None = None

    def __post_init__(self):
        check_callable(self, "gradient", self.gradient, "Reverse(), Mixed() or alike", error=HypergradientArgumentError)
        if isinstance(self.remat, type) or not callable(getattr(self.remat, "segments", None)):
            refuse(self, "remat", self.remat, "NoRemat(), Every(steps) or Sqrt()", HypergradientArgumentError)
        if self.truncate is not None:
            steps = check_whole(self, "truncate", self.truncate, at_least=1, error=HypergradientArgumentError)
            object.__setattr__(self, "truncate", steps)

    def __call__(
        self,
        problem: InnerProblem,
        rule: UpdateRule,
        outer_loss: OuterLoss,
        params: Params,
        hparams: Params,
        batches: Iterable[Any],
        state: InnerState | None = None,
    ) -> Hypergradient:
        batches = collected(batches)
        instead = None if isinstance(self.gradient, FirstOrder) else _FIRST_ORDER
        warnings = check_inputs(problem, rule, outer_loss, params, hparams, batches, state, instead)
        state = state or InnerState(None, 0)
        before = max(len(batches) - self.truncate, 0) if self.truncate else 0
        params, hparams, losses = constants(params), constants(hparams), []
        if before:
            with torch.no_grad():
                start = problem.fit(
                    rule, params, hparams, batches[:before], state=state.rule, step=state.step, carry=state.carry
                )
            params, losses = start.params, start.losses
            state = InnerState(start.state, start.step, carry=start.carry)

        named = twice_differentiated(problem, outer_loss, params, hparams, batches[0], _FIRST_ORDER)
        with named, torch.enable_grad():
            given = leaves(hparams)
            end = problem.fit(
                rule,
                params,
                given,
                batches[before:],
                gradient=self.gradient,
                remat=self.remat,
                state=state.rule,
                step=state.step,
                carry=state.carry,
            )
            value = outer_value(outer_loss, end.params, given, constants(end.carry))
            grads = None
            if value.requires_grad:
                grads = torch.autograd.grad(value, list(given.values()), allow_unused=True)
        found = dict(zip(given, grads or [None] * len(given)))
        after = InnerState(constants(end.state), end.step, carry=constants(end.carry))
        return finished(value, found, hparams, end.params, after, losses + end.losses, warnings)
