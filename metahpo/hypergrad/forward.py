"""Hypergradients in forward mode, along the training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metahpo.checks import check_whole
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
    twice_differentiated,
)
from metahpo.hypergrad.tangents import Step, Tangents, zeros
from metahpo.inner.problem import InnerProblem, constants
from metahpo.inner.rules.base import UpdateRule
from metahpo.inner.steps import Losses


class Memory(NamedTuple):
    """The derivatives of params and rule state so far, for some hyperparameters each (``chunks``) of these shapes."""

    shapes: dict[str, torch.Size]
    chunks: list[Tangents]


@dataclass(frozen=True)
class Forward:
    """Forward mode (Franceschi et al. 2017, section 3.2; real-time recurrent learning, Williams and Zipser 1989):
    exact. The derivatives of the parameters and of the rule's state in each scalar hyperparameter go along with the
    training.

    chunk: how many of the n scalar hyperparameters a step treats at once (None: all): less memory, more time.

    Cost: with n scalars about that of 2 n + 2 trainings in arithmetic, which run as one batch. Memory: n copies of the
    parameters and of the rule's state, and ``chunk`` times the activations of one step, whatever the number of steps.
    The one to take for a few hyperparameters (rates, one decay) and a long training.

    ``state`` carries the derivatives on, so a later call gives the gradient of its outer loss through all steps of the
    earlier calls too, where ``Unroll`` stops at the call's start; a hyperparameter changed in between counts as one.
    """

    chunk: int | None = None

    def __post_init__(self):
        if self.chunk is not None:
            object.__setattr__(
                self, "chunk", check_whole(self, "chunk", self.chunk, at_least=1, error=HypergradientArgumentError)
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
        batches = collected(batches)
        instead = "FiniteDifference()"
        warnings = check_inputs(problem, rule, outer_loss, params, hparams, batches, state, instead)
        state = state or InnerState(None, 0)
        params, hparams, losses = constants(params), constants(hparams), Losses()
        carry = problem.carry if state.carry is None else state.carry
        inner = problem.fit(rule, params, hparams, [], state=state.rule).state
        chunks = self._start(state.memory, params, inner, hparams)
        seeds = _unit_vectors(hparams, [chunk.width for chunk in chunks])
        named = twice_differentiated(problem, outer_loss, params, hparams, batches[0], instead)
        with named, torch.no_grad():
            for step, batch in enumerate(batches, start=state.step):
                now = Step(problem, rule, params, inner, hparams, batch, step, carry)
                for i, seed in enumerate(seeds):
                    chunks[i] = now.pushed(chunks[i], seed)
                params, inner, carry = now.params, now.state, now.carry
                losses.add(now.loss)
        with torch.enable_grad():
            ends, given = leaves(params), leaves(hparams)
            value = outer_value(outer_loss, ends, given, carry)
        grads = _chained(value, ends, given, chunks)
        memory = Memory({name: h.shape for name, h in hparams.items()}, chunks)
        after = InnerState(inner, state.step + len(batches), memory, carry)
        return finished(value, grads, hparams, params, after, losses.stretches(), warnings)

    def _start(self, memory: Any, params: Params, inner: Any, hparams: Params) -> list[Tangents]:
        shapes = {name: h.shape for name, h in hparams.items()}
        if memory is None:
            count = sum(h.numel() for h in hparams.values())
            if not count:
                raise HypergradientError(f"hparams: all of {', '.join(hparams)} are empty")
            whole = self.chunk or count
            return [zeros(params, inner, min(whole, count - done)) for done in range(0, count, whole)]
        if not isinstance(memory, Memory):
            raise HypergradientError(f"state: its memory is {type(memory).__name__}, expected that of Forward")
        if memory.shapes != shapes:
            found, expected = ({n: list(s) for n, s in each.items()} for each in (shapes, memory.shapes))
            raise HypergradientError(f"hparams: found shapes {found}, those that the state carries are {expected}")
        return list(memory.chunks)


def _unit_vectors(hparams: Params, counts: list[int]) -> list[Params]:
    """For each chunk the tangents of the hyperparameters themselves, [count, *shape]: together an identity matrix."""
    total, done, chunks = sum(counts), 0, []
    for count in counts:
        rows = torch.arange(done, done + count)[:, None] == torch.arange(total)
        columns = rows.split([h.numel() for h in hparams.values()], dim=1)
        chunks.append({n: c.to(h).reshape(count, *h.shape) for (n, h), c in zip(hparams.items(), columns)})
        done += count
    return chunks


def _chained(value: Tensor, ends: Params, given: Params, chunks: list[Tangents]) -> Params:
    """The outer loss's own gradient in the hyperparameters, and that through the final parameters."""
    inputs = [*ends.values(), *given.values()]
    if value.requires_grad:
        found = torch.autograd.grad(value, inputs, materialize_grads=True)
    else:
        found = tuple(map(torch.zeros_like, inputs))
    slopes, direct = found[: len(ends)], found[len(ends) :]
    terms = [[t.flatten(1) @ s.flatten() for t, s in zip(chunk.params, slopes)] for chunk in chunks]
    parts = torch.cat([torch.stack(row).sum(0) for row in terms]).split([h.numel() for h in given.values()])
    return {name: d + part.view_as(d).to(d) for (name, d), part in zip(zip(given, direct), parts)}
