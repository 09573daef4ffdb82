"""Hypergradients by the implicit function theorem, around the training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metahpo.checks import check_callable, check_flag, check_whole
from metahpo.errors import HypergradientArgumentError, HypergradientError, NonFiniteError
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
from metahpo.hypergrad.solvers.base import Product, Solution, Solver
from metahpo.hypergrad.solvers.cg import CG
from metahpo.hypergrad.systems import System, hessian_system, mean_over_batches, minimised_slopes, update_system
from metahpo.inner.problem import RULE, InnerProblem, constants
from metahpo.inner.rules.base import UpdateRule

# What needs no second derivative.
_INSTEAD = "FiniteDifference()"


@dataclass(frozen=True)
class Implicit:
    """The implicit function theorem at the end w of the training (Bengio 2000; Pedregosa 2016; Lorraine et al. 2020,
    equations 2 and 3): d outer/dh - d/dh (v . d inner/dw), with H v = d outer/dw and H the inner loss's Hessian.

    solver: of the system: ``CG``, ``Neumann``, ``Nystrom``; or ``FixedPoint``, for the end of any contractive update
    (Grazzi et al. 2020): then (I - J^T) v = d outer/d(w, rule state) and d outer/dh + v . d update/dh. batches: the
    inner loss of H is the mean over the last so many. warm_start: whether a solver begins at the v that a ``state``
    carries (Nystrom has no beginning).

    Cost: the plain training, one gradient of each loss, and the solver's products, of about two gradients each.
    Memory: the graph of one gradient on ``batches`` batches, and the solver's vectors; free of the number of steps.
    Bias: the distance of w from the minimum (FixedPoint: from the fixed point), and the solver's residual. The one to
    take for trainings that converge, with any number of steps and hyperparameters, millions of both.

    The inner loss has the rule's weight decay besides, weight_decay / 2 |w|^2, and H its diagonal. Where a minimum ends
    the training, a rule's other hyperparameters (its rate) do not move that end: their gradient is zero, which a
    warning tells, as it tells of a solver that did not converge and of a training from its beginning whose end is far
    from a minimum: the inner gradient there is above a tenth of that at the start. Raises NonFiniteError for a solver
    that diverged, HypergradientError for a decay that is taken off the parameters (``AdamW``).
    """

    solver: Solver = CG()
    batches: int = 1
    warm_start: bool = True

    def __post_init__(self):
        object.__setattr__(
            self, "batches", check_whole(self, "batches", self.batches, at_least=1, error=HypergradientArgumentError)
        )
        check_callable(self, "solver", self.solver, "a solver such as CG()", error=HypergradientArgumentError)
        check_flag(self, "warm_start", self.warm_start, error=HypergradientArgumentError)

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
        warnings = check_inputs(problem, rule, outer_loss, params, hparams, batches, state, _INSTEAD)
        new, state = state is None, state or InnerState(None, 0)
        params, losses, last = constants(params), [], batches[-self.batches :]
        start = self._distance(problem, rule, params, constants(hparams), last) if new else None
        with torch.no_grad():
            # By stretches, so that no more than so many losses stand alone.
            for first in range(0, len(batches), 256):
                stretch = batches[first : first + 256]
                end = problem.fit(
                    rule, params, constants(hparams), stretch, state=state.rule, step=state.step, carry=state.carry
                )
                params, state = end.params, InnerState(end.state, end.step, state.memory, end.carry)
                losses.append(torch.stack(end.losses))
        return self._at(problem, rule, outer_loss, params, hparams, last, state, losses, warnings, start)

    def hypergradient_at(
        self,
        problem: InnerProblem,
        rule: UpdateRule | None,
        outer_loss: OuterLoss,
        params: Params,
        hparams: Params,
        batches: Iterable[Any],
        state: InnerState | None = None,
    ) -> Hypergradient:
        """The hypergradient at ``params`` as they are: no step is taken, for a training that goes on elsewhere.

        batches: all of them make the inner loss's mean. rule: ``FixedPoint`` needs it; None otherwise does. state: that
        of an earlier result (its ``memory`` is the warm start); with ``FixedPoint`` ``InnerState(rule state, steps
        taken, memory)``. In the result ``losses`` is empty. What ``hparams`` and the losses are is checked where
        ``state`` is None.
        """
        batches = collected(batches)
        if rule is None:
            if self.solver.system == "map":
                raise HypergradientError(f"{type(self.solver).__name__} needs the rule, found None")
            rule = UpdateRule()
        warnings = check_inputs(problem, rule, outer_loss, params, hparams, batches, state, _INSTEAD)
        state = state or InnerState(None, 0)
        return self._at(problem, rule, outer_loss, params, hparams, batches, state, [], warnings)

    def _at(
        self,
        problem: InnerProblem,
        rule: UpdateRule,
        outer_loss: OuterLoss,
        params: Params,
        hparams: Params,
        batches: Sequence[Any],
        state: InnerState,
        losses: Sequence[Tensor],
        warnings: Sequence[str],
        start: Tensor | None = None,
    ) -> Hypergradient:
        if not batches:
            raise HypergradientError("batches: found none, expected those of the inner loss")
        with twice_differentiated(problem, outer_loss, params, hparams, batches[-1], _INSTEAD):
            return self._solved_at(problem, rule, outer_loss, params, hparams, batches, state, losses, warnings, start)

    def _solved_at(
        self,
        problem: InnerProblem,
        rule: UpdateRule,
        outer_loss: OuterLoss,
        params: Params,
        hparams: Params,
        batches: Sequence[Any],
        state: InnerState,
        losses: Sequence[Tensor],
        warnings: Sequence[str],
        start: Tensor | None,
    ) -> Hypergradient:
        ends, given = leaves(params), leaves(hparams)
        carry = problem.carry if state.carry is None else state.carry
        with torch.enable_grad():
            value = outer_value(outer_loss, ends, given, carry)
            inputs = [*ends.values(), *given.values()]
            found = (None,) * len(inputs)
            if value.requires_grad:
                found = torch.autograd.grad(value, inputs, allow_unused=True)
            if self.solver.system == "map":
                system = update_system(problem, rule, ends, given, batches, state.rule, state.step, carry)
            else:
                system = hessian_system(problem, rule, ends, given, batches, state.step, carry)
        slopes, direct = found[: len(ends)], dict(zip(given, found[len(ends) :]))
        rhs = system.vector(slopes)
        solution = self._solved(system.product, rhs, self._start(state.memory, rhs))
        after = InnerState(state.rule, state.step, solution.v, state.carry)
        if not math.isfinite(float(solution.residual)):
            # Raises where the training or the outer loss diverged, which comes first.
            finished(value, dict.fromkeys(given), hparams, params, after, losses)
            raise NonFiniteError(self._diverged(system, rhs))
        through = system.to_hparams(solution.v)
        told = self._told(solution, [name for name in given if name.startswith(RULE) and through[name] is None])
        told += self._far(system, ends, start)
        grads = {name: _sum(direct[name], through.get(name)) for name in given}
        return finished(value, grads, hparams, params, after, losses, [*warnings, *told])

    def _solved(self, product: Product, rhs: Tensor, start: Tensor | None) -> Solution:
        """By a right-hand side of size 1: solvers square it, which a small one would not survive in float32."""
        size = rhs.abs().max()
        size = torch.where(size > 0, size, 1.0)
        found = self.solver(product, rhs / size, None if start is None else start / size)
        return replace(found, v=found.v * size)

    def _start(self, memory: Any, rhs: Tensor) -> Tensor | None:
        if memory is None or not self.warm_start:
            return None
        if not isinstance(memory, Tensor) or memory.shape != rhs.shape:
            found = list(memory.shape) if isinstance(memory, Tensor) else type(memory).__name__
            raise HypergradientError(
                f"state: its memory is {found}, expected an earlier solution {list(rhs.shape)}; was it another "
                "strategy's or another solver's?"
            )
        return memory

    def _distance(
        self, problem: InnerProblem, rule: UpdateRule, params: Params, hparams: Params, batches: Sequence[Any]
    ) -> Tensor:
        """What ``System.distance`` is where the training begins."""
        if self.solver.system == "map":
            with torch.no_grad():
                moved = mean_over_batches(problem, problem.carry).fit(rule, params, hparams, [batches]).params
            parts = [moved[name] - p for name, p in params.items()]
        else:
            with torch.enable_grad():
                _, parts = minimised_slopes(problem, rule, leaves(params), hparams, batches, 0, problem.carry)
        return torch.cat([part.detach().flatten() for part in parts]).norm()

    def _far(self, system: System, params: Params, start: Tensor | None) -> list[str]:
        """A warning where the training has not come near to where its system holds."""
        if start is None:
            return []
        end, size = system.distance(len(params)), torch.cat([p.detach().flatten() for p in params.values()]).norm()
        # What rounding alone moves the parameters, or the loss, by is none.
        noise = torch.finfo(end.dtype).eps ** 0.5 * (size if system.is_update else system.value.detach().abs() / size)
        if bool(end <= 0.1 * start) or bool(end <= noise):
            return []
        what = "the update" if system.is_update else "the inner gradient"
        where = "a fixed point" if system.is_update else "a minimum"
        return [
            f"{what} at the end is {float(end / start):.2g} of that at the start, so the training has not come to "
            f"{where}, at which this gradient holds; train for longer, or at other rates, or take Unroll()"
        ]

    def _told(self, solution: Solution, own: list[str]) -> list[str]:
        """own: the rule's hyperparameters that nothing in the system depends on."""
        name, told = type(self.solver).__name__, []
        if own and self.solver.system == "hessian":
            told.append(
                f"{', '.join(map(repr, own))}: a minimum of the inner loss, where Implicit({name}) takes the training "
                "to end, does not depend on the rule; the gradient is zero"
            )
        if not solution.converged or solution.note:
            told.append(
                f"{name}: relative residual {float(solution.residual):.1e} after {solution.steps} steps, asked for "
                f"{solution.tolerance:.1e}; {solution.note or self.solver.advice}"
            )
        return told

    def _diverged(self, system: System, rhs: Tensor) -> str:
        if not bool(torch.isfinite(system.value)):
            return f"the inner loss is {float(system.value)} at the end of the training"
        if not bool(torch.isfinite(rhs).all()):
            return "the outer loss's gradient is not finite at the end of the training"
        name = type(self.solver).__name__
        return f"{name} diverged: its residual is not finite; {self.solver.advice}"


def _sum(direct: Tensor | None, through: Tensor | None) -> Tensor | None:
    return through if direct is None else direct if through is None else direct + through
