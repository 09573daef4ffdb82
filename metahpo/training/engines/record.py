"""A recorded step, and the looks that it still is what a plain step does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metahpo.functional import FunctionalModule, Params
from metahpo.learners.base import MetaLearner
from metahpo.training.engines.base import MetaGradient
from metahpo.training.engines.python_state import PythonState, Watch

Program = Callable[..., MetaGradient]
Step = Callable[[], MetaGradient]


class Record:
    """One kind of step, which runs plain at first, and as a record where that gives the same.

    exact: whether the record's operations are the plain step's own, one for one.

    A record holds what Python decided while it was made. So the first step runs plain and is watched: a learner whose
    attributes change in two steps, or whose numbers differ when it drew from ``random`` or ``numpy.random``, is not
    recorded. What no look at Python shows (a global, a generator of the learner's own) shows in the numbers: the record
    is compared with a plain step at once, and after 2, 4, 8, ... steps more.
    """

    def __init__(self, exact: bool):
        self._exact = exact
        self._program: Program | None = None
        self._state: PythonState | None = None
        self._unsettled = False
        self._count = 0

    @property
    def made(self) -> bool:
        return self._program is not None

    def step(
        self, learner: MetaLearner, plain: Step, make: Callable[[], Program | None], inputs: tuple[Any, ...]
    ) -> tuple[MetaGradient, str | None]:
        """The step's result, and why there can be no record from now on, or None; "" where ``make`` has said why.

        plain: the step without a record; make: the record, which takes ``inputs``, or None.
        """
        devices = sorted({p.device.index for p in learner.parameters() if p.is_cuda})
        if self._program is None or self._state is None:
            return self._begin(learner, plain, make, inputs, devices)
        if changed := self._state.changed():
            return plain(), f"{changed} changed, which a record does not see"
        self._count += 1
        if self._count < 2 or self._count & (self._count - 1):
            return self._run(inputs), None
        return self._compared(learner, plain, inputs, devices)

    def _begin(
        self, learner: MetaLearner, plain: Step, make: Callable[[], Program | None], inputs: Any, devices: list[int]
    ) -> tuple[MetaGradient, str | None]:
        start, watch = _generators(devices), Watch(learner)
        result = plain()
        changed, drew = watch.changed(), watch.drew()
        if drew:
            after = _generators(devices)
            _set_generators(start, devices)
            again = plain()
            _set_generators(after, devices)
            if not self._same(learner, again, result):
                return result, "the learner draws from random or numpy.random, which a record would not do again"
        if changed:
            # Once it may have been set up at its first call.
            reason = f"{changed} changes from step to step, which a record would not do" if self._unsettled else None
            self._unsettled = True
            return result, reason
        after = _generators(devices)
        program = make()
        if program is None:
            return result, ""
        self._program, self._state = program, PythonState(learner)
        _set_generators(start, devices)
        return self._compared(learner, lambda: result, inputs, devices, after)

    def _compared(
        self,
        learner: MetaLearner,
        plain: Step,
        inputs: tuple[Any, ...],
        devices: list[int],
        after_plain: list[Tensor] | None = None,
    ) -> tuple[MetaGradient, str | None]:
        """The record's result where it is the plain step's; after_plain: the generators after that, had it run."""
        start = _generators(devices)
        recorded = self._run(inputs)
        after = _generators(devices)
        if after_plain is None:
            _set_generators(start, devices)
        wanted = plain()
        ended = after_plain or _generators(devices)
        _set_generators(after, devices)
        comparable = all(torch.equal(a, b) for a, b in zip(after, ended))  # Dropout may draw other numbers.
        if not comparable or self._same(learner, recorded, wanted):
            return recorded, None
        return wanted, "Python decides what a step computes, and decided otherwise than in the record"

    def _run(self, inputs: tuple[Any, ...]) -> MetaGradient:
        assert self._program is not None
        with torch.no_grad():
            return self._program(*inputs)

    def _same(self, learner: MetaLearner, found: MetaGradient, wanted: MetaGradient) -> bool:
        worst, _ = difference(found.grads, wanted.grads)
        lowered = any(m.autocast is not None for m in learner.modules() if isinstance(m, FunctionalModule))
        double = wanted.loss.dtype == torch.float64
        tolerance = 1e-8 if double else 1e-3 if self._exact and not lowered and not wanted.loss.is_cuda else 0.05
        finite = all(bool(g.isfinite().all()) for g in wanted.grads.values())
        return worst <= tolerance or not finite


def difference(found: Params, wanted: Params) -> tuple[float, str]:
    """The largest difference of a parameter's gradient relative to the whole gradient's norm, and whose it is."""
    # A gradient may be zero.
    norm = torch.stack([g.norm() for g in wanted.values()]).norm().clamp(min=1e-6)
    differences = {name: float((found[name] - g).norm() / norm) for name, g in wanted.items()}
    worst = max(differences, key=lambda name: differences[name] if differences[name] == differences[name] else 1e300)
    return differences[worst], worst


def _generators(devices: list[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _set_generators(states: list[Tensor], devices: list[int]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:]):
        torch.cuda.set_rng_state(state, device)
