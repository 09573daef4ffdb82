"""Which parameters no task of a batch uses: an optimizer leaves them alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from metahpo.errors import NetError
from metahpo.inner.randomness import python_draws, set_python_draws
from metahpo.learners.base import MetaLearner
from metahpo.learners.phase import Phase
from metahpo.tasks.task import Task
from metahpo.training.engines.base import MetaGradient
from metahpo.training.engines.loop import Loop


class Unused:
    """For engines whose gradients are zeros where a parameter is not used: all their tasks compute the same way, so
    that one of them shows which these are, once for each kind of phase."""

    def __init__(self) -> None:
        self._learner: Callable[[], MetaLearner | None] = lambda: None
        self._known: dict[Any, tuple[str, ...]] = {}

    def told(self, result: MetaGradient, learner: MetaLearner, tasks: Task, phase: Phase) -> MetaGradient:
        """The result with the names of the parameters that are not used."""
        if self._learner() is not learner:
            self._learner, self._known = weakref.ref(learner), {}
        kind = phase.first_order, phase.step_weights is None, tuple(result.grads)
        if kind not in self._known:
            zero = [name for name, g in result.grads.items() if not bool(g.any())]
            self._known[kind] = _unused(zero, learner, tasks, phase) if zero else ()
        return result._replace(unused=self._known[kind])


def _unused(names: list[str], learner: MetaLearner, tasks: Task, phase: Phase) -> tuple[str, ...]:
    """Those of the parameters that the first task's loss does not depend on."""
    drawn, first = python_draws(), Task(*(part[:1] for part in tasks))
    try:
        with torch.random.fork_rng(devices=[first.query_x.device] if first.query_x.is_cuda else []):
            unused = Loop().meta_gradient(learner, first, phase).unused
    except (NetError, RuntimeError):  # Only the engine's own way can run it.
        return ()
    finally:
        set_python_draws(drawn)
    return tuple(name for name in names if name in unused)
