"""Comparing an engine with the reference before a run."""

from __future__ import annotations

import torch

from metahpo.errors import NetError
from metahpo.functional import FunctionalModule
from metahpo.functional.copies import copied
from metahpo.learners.base import MetaLearner
from metahpo.learners.phase import Phase
from metahpo.tasks.task import Task
from metahpo.training.engines.auto import Auto
from metahpo.training.engines.base import Engine
from metahpo.training.engines.loop import Loop
from metahpo.training.engines.record import difference

# Float32 gradients of the same function may differ by percents where a ReLU or a maximum is a rounding away from
# changing sides, so what can be is compared in float64.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 0.05}


def check_engine(engine: Engine, learner: MetaLearner, tasks: Task, phase: Phase) -> None:
    """Raises NetError if ``engine``'s outer gradient of the batch's first task differs from ``loop``'s.

    The comparison is in float64, on copies, where the learner can run so, and loose in float32 otherwise.
    """
    if isinstance(engine, Auto):  # Which it takes is to be timed on the run's own batch.
        engine = engine.settle("training", learner, tasks, phase)
    task = Task(*(t[:1] for t in tasks))
    with torch.random.fork_rng(devices=[task.query_x.device] if task.query_x.is_cuda else []):
        try:
            worst, name = _difference(engine, _copy(learner).double(), _double(task), phase)
            tolerance = _TOLERANCE[torch.float64]
        except NetError:
            raise
        except RuntimeError:
            worst, name = _difference(engine, _copy(learner), task, phase)
            tolerance = _TOLERANCE[torch.float32]
    if not worst <= tolerance:
        raise NetError(
            f"engine {engine.name} gives another outer gradient than engine loop: {name} differs by {worst:.1e} of the "
            f"gradient's norm, expected at most {tolerance:.0e}; choose engine loop, and please report it"
        )


def _difference(engine: Engine, learner: MetaLearner, task: Task, phase: Phase) -> tuple[float, str]:
    """The largest difference of a parameter's gradient relative to the whole gradient's norm, and whose it is."""
    found, wanted = [], []
    for each, into in ((engine, found), (Loop(), wanted)):
        torch.manual_seed(0)
        into.append({name: g.clone() for name, g in each.meta_gradient(learner, task, phase).grads.items()})
    return difference(found[0], wanted[0])


def _copy(learner: MetaLearner) -> MetaLearner:
    """A copy without autocast, which would round what is to be compared in float64."""
    twin = copied(learner)
    for module in twin.modules():
        if isinstance(module, FunctionalModule):
            module.autocast = None
    return twin


def _double(task: Task) -> Task:
    return Task(*(t.double() if t.is_floating_point() else t for t in task))
