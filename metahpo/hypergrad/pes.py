"""Hypergradients by persistent evolution strategies: no derivative of the training at all."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from metahpo.checks import check_flag, check_number, check_whole, plain, refuse
from metahpo.errors import HypergradientArgumentError, HypergradientError, NonFiniteError
from metahpo.functional.trees import Params, map_tree
from metahpo.hypergrad.base import (
    Hypergradient,
    InnerState,
    OuterLoss,
    check_inputs,
    collected,
    finished,
    outer_value,
)
from metahpo.inner.problem import InnerProblem, constants
from metahpo.inner.randomness import same_draws
from metahpo.inner.rules.base import RuleState, UpdateRule


class Particles(NamedTuple):
    """What ``PES`` carries from window to window.

    windows: how many there were; params, rule: the inner parameters, and the rule's state with the problem's carry, row
    0 of the unperturbed training, then N/2 with + and N/2 with - their perturbations; xi: the sum of each pair's
    perturbations, [N/2, ...] by hyperparameter; values: the outer loss of each row, [1 + N].
    """

    windows: int
    params: Params
    rule: RuleState
    xi: Params
    values: Tensor


@dataclass(frozen=True)
class PES:
    """Persistent evolution strategies (Vicol, Metz and Sohl-Dickstein 2021, arXiv 2112.13835, algorithm 2).

    A call is one truncation window: the batches given. N particles in antithetic pairs train at once (``vmap``), each
    with hyperparameters perturbed anew in every window by normal noise of deviation sigma, and each goes on from its
    own parameters. With L_i the outer loss of particle i at the window's end and xi_i the sum of its perturbations so
    far, the estimate is 1/(N sigma^2) sum_i xi_i L_i. hparams may change between calls: that is the use, an outer step
    after each window. The result's value, losses and final_params are those of one more training, not perturbed.

    particles: N, even. sigma: one for all hyperparameters, which should thus have like scales (take logarithms of
    rates). seed: with the number of the window it fixes the noise. persistent: False makes it plain evolution
    strategies in each window, from the unperturbed parameters, as a control. telescoping: L_i less its value at the
    window before stands for L_i, so that the estimates sum to the gradient of the last loss alone.

    Bias: none for the gradient of the sum over windows of the losses, smoothed by sigma, where truncation, and
    ``persistent=False``, see only what pays off inside a window; hparams that change on the way leave the lag of every
    update before the training's end. Variance: falls like 1/N, grows with the number of
    hyperparameters and, more slowly, of windows. Cost: N + 1 trainings, in parallel. Memory: N + 1 states, rule states
    and steps' activations, whatever the number of steps. The one to take for few hyperparameters, long horizons updated
    on the way, and losses that are chaotic or have no useful derivative (an accuracy).

    Raises NonFiniteError where a perturbed training diverges.
    """

    particles: int
    sigma: float
    seed: int = 0
    persistent: bool = True
    telescoping: bool = False

    def __post_init__(self):
        if not isinstance(plain(self.particles), int) or self.particles < 2 or self.particles % 2:
            refuse(self, "particles", self.particles, "an even number of at least 2", HypergradientArgumentError)
        object.__setattr__(self, "particles", int(self.particles))
        for flag in ("persistent", "telescoping"):
            check_flag(self, flag, getattr(self, flag), error=HypergradientArgumentError)
        object.__setattr__(
            self, "sigma", check_number(self, "sigma", self.sigma, above=0, error=HypergradientArgumentError)
        )
        object.__setattr__(
            self, "seed", check_whole(self, "seed", self.seed, at_least=0, error=HypergradientArgumentError)
        )
        if self.telescoping and not self.persistent:
            raise HypergradientArgumentError("PES: telescoping needs persistent=True, which carries the losses on")

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
        warnings = check_inputs(problem, rule, outer_loss, params, hparams, batches, state)
        params, hparams = constants(params), constants(hparams)
        first = state.step if state else 0
        with torch.no_grad():
            before = self._before(problem, rule, params, hparams, state)
            noise = self._noise(hparams, before.windows)
            given = {name: h + _signed(noise[name]) for name, h in hparams.items()}
            xi = {name: before.xi[name] + noise[name] if self.persistent else noise[name] for name in hparams}
            rows, rule_rows, losses, values = _train(
                problem, rule, outer_loss, before.params, given, batches, before.rule, first
            )
            gains = values - before.values if self.telescoping else values
            grads = self._estimate(xi, gains)
        final, (rule_state, carry) = _row(rows, 0), _row(rule_rows, 0)
        memory = Particles(before.windows + 1, rows, rule_rows, xi, values)
        after = InnerState(rule_state, first + len(batches), memory, carry)
        lost = torch.isfinite(values[0]) & ~torch.isfinite(values).all()
        if bool(lost):
            count = int((~torch.isfinite(values)).sum())
            raise NonFiniteError(
                f"PES: {count} of {self.particles} perturbed trainings diverged by step {after.step}, though the "
                f"unperturbed one did not; lower sigma (now {self.sigma:g}) or the rates"
            )
        return finished(values[0], grads, hparams, final, after, list(losses[0]), warnings)

    def _before(
        self, problem: InnerProblem, rule: UpdateRule, params: Params, hparams: Params, state: InnerState | None
    ) -> Particles:
        """The particles at the window's start: all alike in the first, and in every one if not persistent."""
        count, windows = self.particles + 1, 0
        if state is None:
            rule_state, carry = rule.init(params), problem.carry
        elif isinstance(state.memory, Particles) and len(state.memory.values) == count:
            if self.persistent:
                return state.memory
            windows, rule_state, carry = state.memory.windows, state.rule, state.carry
        else:
            raise HypergradientError(f"PES: the state is not of an earlier call with {self.particles} particles")

        def repeated(tensor: Tensor) -> Tensor:
            return tensor.detach().expand(count, *tensor.shape)

        xi = {name: h.new_zeros(self.particles // 2, *h.shape) for name, h in hparams.items()}
        values = next(iter(hparams.values())).new_zeros(count)
        inner = tree_map_only(Tensor, repeated, (rule_state, carry))
        return Particles(windows, map_tree(repeated, params), inner, xi, values)

    def _noise(self, hparams: Params, window: int) -> Params:
        """Each pair's perturbation of each hyperparameter in a window, [N/2, ...]; the same on every device."""
        seed = int(np.random.SeedSequence([self.seed, window]).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(seed)
        return {
            name: self.sigma
            * torch.randn(self.particles // 2, *h.shape, generator=generator, dtype=h.dtype).to(h.device)
            for name, h in hparams.items()
        }

    def _estimate(self, xi: Params, gains: Tensor) -> Params:
        up, down = gains[1:].chunk(2)
        weights = (up - down) / (self.particles * self.sigma**2)
        return {name: torch.tensordot(weights.to(x.dtype), x, 1) for name, x in xi.items()}


def _signed(noise: Tensor) -> Tensor:
    """The perturbations of all rows: none, the pairs' plus, the pairs' minus."""
    return torch.cat([torch.zeros_like(noise[:1]), noise, -noise])


def _train(
    problem: InnerProblem,
    rule: UpdateRule,
    outer_loss: OuterLoss,
    params: Params,
    hparams: Params,
    batches: list[Any],
    rule_state: tuple[RuleState, Any],
    first: int,
) -> tuple[Params, Any, Tensor, Tensor]:
    """One training a row of params, hparams and (the rule's state, the carry): their ends, inner losses [rows, K],
    outer [rows]."""
    leaves, spec = tree_flatten(rule_state)
    after: list[Any] = []

    def one(params: Params, hparams: Params, tensors: list[Tensor]):
        given = iter(tensors)
        state, carry = tree_unflatten([next(given) if isinstance(x, Tensor) else x for x in leaves], spec)
        end = problem.fit(rule, params, hparams, batches, state=state, step=first, carry=carry)
        # vmap lets only tensors out; what else a rule's state holds is the same for all.
        after[:] = tree_flatten((end.state, end.carry))
        out = [x for x in after[0] if isinstance(x, Tensor)]
        return end.params, out, torch.stack(end.losses), outer_value(outer_loss, end.params, hparams, end.carry)

    given_rows = (params, hparams, [x for x in leaves if isinstance(x, Tensor)])
    try:
        rows, tensors, losses, values = vmap(one, randomness="same")(*given_rows)
    except RuntimeError as error:
        # What vmap cannot run: a look at a tensor's value, a net that calls torch.autograd.grad.
        if not re.search("vmap|functorch", str(error)):
            raise
        rows, tensors, losses, values = _by_loop(one, given_rows)
    given = iter(tensors)
    state = tree_unflatten([next(given) if isinstance(x, Tensor) else x for x in after[0]], after[1])
    return rows, state, losses, values


def _by_loop(one: Callable[..., Any], given: Any) -> Any:
    """``vmap(one, randomness="same")(*given)``, one row after the other."""
    alike = same_draws(one, tree_leaves(given))
    results = [tree_map_only(Tensor, torch.detach, alike(*_row(given, i))) for i in range(len(tree_leaves(given)[0]))]
    return tree_map(lambda *each: torch.stack(each), *results)


def _row(tree: Any, index: int) -> Any:
    return tree_map_only(Tensor, lambda t: t[index].clone(), tree)
