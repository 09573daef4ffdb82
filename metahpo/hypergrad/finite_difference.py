"""Hypergradients of the last inner step alone, its mixed second derivative by a finite difference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metahpo.checks import check_number
from metahpo.errors import HypergradientArgumentError, HypergradientError
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
)
from metahpo.inner.gradient import FirstOrder, Grads, InnerLoss
from metahpo.inner.problem import InnerProblem, constants, split
from metahpo.inner.randomness import Draws
from metahpo.inner.rules.base import UpdateRule


@dataclass(frozen=True)
class FiniteDifference:
    """The second-order approximation of DARTS (Liu, Simonyan and Yang 2019, section 2.3, equations 7 and 8), for any
    first-order rule.

    All steps but the last are plain training. Through the last, w' = rule(w, g(w, h)), the outer gradient in the rule's
    own hyperparameters is exact; with u what d outer / d w' sends through the rule to g, that in the loss's is
    u . dg/dh = (d/dh L(w + e u, h) - d/dh L(w - e u, h)) / 2e, with e = epsilon / |u|.

    epsilon: the length of the shift of w; too small a one loses the difference to rounding in float32.

    Bias: that of ``Unroll(truncate=1)``, which sees what pays off in one step, and of order epsilon^2 (none for an L
    that is quadratic in w). Cost: the training, and three gradients more. Memory: one step's, whatever the number of
    steps and hyperparameters; never a second derivative. The one to take where hyperparameters and weights are learnt
    together, a step each in turn, and for nets without second derivatives.

    Raises HypergradientError for a rule that needs the loss itself (Newton and its kin).
    """

    epsilon: float = 0.01

    def __post_init__(self):
        object.__setattr__(
            self, "epsilon", check_number(self, "epsilon", self.epsilon, above=0, error=HypergradientArgumentError)
        )

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
        if getattr(rule, "needs_loss", False):
            raise HypergradientError(
                f"FiniteDifference: {type(rule).__name__} computes with the loss itself, not its gradient alone; "
                "choose Unroll(truncate=1)"
            )
        batches = collected(batches)
        warnings = check_inputs(problem, rule, outer_loss, params, hparams, batches, state)
        state, hparams = state or InnerState(None, 0), constants(hparams)
        with torch.no_grad():
            start = problem.fit(
                rule, constants(params), hparams, batches[:-1], state=state.rule, step=state.step, carry=state.carry
            )
        held, given = _Held(), leaves(hparams)
        with torch.enable_grad():
            end = problem.fit(
                rule,
                start.params,
                given,
                batches[-1:],
                gradient=held,
                state=start.state,
                step=start.step,
                carry=start.carry,
            )
            value = outer_value(outer_loss, end.params, given, end.carry)
        found: dict[str, Tensor | None] = dict.fromkeys(given)
        if value.requires_grad:
            wanted = [*given.values(), *held.grads.values()]
            reached = torch.autograd.grad(value, wanted, allow_unused=True)
            found = dict(zip(given, reached))
            others = split(given)[0]
            shift = dict(zip(held.grads, reached[len(given) :]))

            def loss(params: Params, others: Params) -> Tensor:
                return problem.value(params, others, batches[-1], start.carry)[0]

            mixed = self._mixed(loss, start.params, others, shift, held.draws)
            found |= {name: _sum(found[name], g) for name, g in mixed.items()}
        after = InnerState(constants(end.state), end.step, carry=end.carry)
        return finished(value, found, hparams, end.params, after, start.losses + end.losses, warnings)

    def _mixed(
        self,
        loss: Callable[[Params, Params], Tensor],
        params: Params,
        others: Params,
        shift: Mapping[str, Tensor | None],
        draws: Draws,
    ) -> dict[str, Tensor | None]:
        """u . dg/dh by hyperparameter of the loss; None where it does not depend on one, zero where u is."""
        used = {name: u for name, u in shift.items() if u is not None}
        if not used or not others:
            return {}
        size = torch.stack([u.square().sum() for u in used.values()]).sum().sqrt()
        # At u = 0 both ends are the same, and their difference is zero over any e.
        e = self.epsilon / torch.where(size > 0, size, torch.ones_like(size))

        def slope(sign: int) -> tuple[Tensor | None, ...]:
            shifted = {name: p + sign * e * used[name] if name in used else p for name, p in params.items()}
            with draws.replaying(), torch.enable_grad():
                value = loss(shifted, others)
                if not value.requires_grad:
                    return (None,) * len(others)
                return torch.autograd.grad(value, list(others.values()), allow_unused=True)

        pairs = zip(slope(1), slope(-1))
        return {name: None if a is None or b is None else (a - b) / (2 * e) for name, (a, b) in zip(others, pairs)}


class _Held:
    """The first-order gradient of one step, kept as the start of a graph of its own, and the random numbers (dropout)
    that it drew, which the difference draws again."""

    def __init__(self):
        self.grads: Params = {}

    def __call__(
        self, loss: InnerLoss, params: Params, carry: Any, batch: Any, step: int
    ) -> tuple[Grads, Tensor, Any]:
        self.draws = Draws(params.values())
        with self.draws.recording():
            grads, value, carry = FirstOrder()(loss, params, carry, batch, step)
        self.grads = {name: g.requires_grad_() for name, g in grads.items() if g is not None}
        return grads, value, carry


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
