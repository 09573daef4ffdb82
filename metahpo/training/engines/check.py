"""Comparing an engine with the reference before a run."""

from __future__ import annotations

import warnings

import torch

from metahpo.errors import NetError
from metahpo.functional import FunctionalModule
from metahpo.functional.copies import copied
from metahpo.inner.randomness import PythonDraws, python_draws, python_draws_kept, set_python_draws
from metahpo.learners.base import MetaLearner
from metahpo.learners.maml import MAML
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
    with torch.random.fork_rng(devices=[task.query_x.device] if task.query_x.is_cuda else []), python_draws_kept():
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
    drawn = python_draws()
    for each, into in ((engine, found), (Loop(), wanted)):
        torch.manual_seed(0)
        set_python_draws(drawn)
        into.append({name: g.clone() for name, g in each.meta_gradient(learner, task, phase).grads.items()})
    return difference(found[0], wanted[0])


def check_gradient(learner: MetaLearner, tasks: Task, phase: Phase) -> None:
    """Warns if the outer gradient of the batch's first task is not the slope of its loss along a random direction.

    In float64, on a copy. It says nothing of learners that are first-order or implicit by design, where two sizes of
    the difference disagree (a ReLU or a maximum changed sides), and where the net does not run so; it never raises.
    """
    own = type(learner).adapt is MAML.adapt and type(learner).meta_loss is MAML.meta_loss
    if not own or phase.first_order or getattr(learner, "first_order", False):
        return
    task, drawn = Task(*(t[:1] for t in tasks)), python_draws()
    with torch.random.fork_rng(devices=[task.query_x.device] if task.query_x.is_cuda else []):
        try:
            slope, quotients, size = _slopes(_copy(learner).double(), _double(task), phase, drawn)
        except Exception:
            return
        finally:
            set_python_draws(drawn)
    steady = abs(quotients[0] - quotients[1]) <= 1e-3 * (size + abs(quotients[0]))
    if steady and min(abs(q - slope) for q in quotients) > 0.01 * (size + abs(slope)):
        warnings.warn(
            f"the outer gradient's slope along a random direction is {slope:.4g}, and a difference gives "
            f"{quotients[1]:.4g}: an operation of the net has a wrong second derivative, or cuts its graph on purpose "
            "(detach, no_grad); first_order does not need it",
            stacklevel=2,
        )


def _slopes(
    learner: MetaLearner, task: Task, phase: Phase, drawn: PythonDraws
) -> tuple[float, tuple[float, float], float]:
    """The gradient's slope along a direction, differences of two sizes, and how large such a slope is."""
    params = learner.outer_params()

    def again() -> None:
        torch.manual_seed(0)
        set_python_draws(drawn)

    again()
    grads = Loop().meta_gradient(learner, task, phase).grads
    start = {name: p.detach().clone() for name, p in params.items()}
    # Along what the gradient knows: signs that a layer keeps beside its weights have none, and are no numbers to move.
    way = {n: torch.randn_like(g) * (g != 0) * start[n].abs().mean().clamp(min=1e-3) for n, g in grads.items()}
    parts = torch.cat([(g * way[n]).flatten() for n, g in grads.items()])

    @torch.no_grad()
    def loss(size: float) -> float:
        for name, p in params.items():
            p.copy_(start[name] + size * way[name])
        again()
        return float(learner.meta_loss(task.select(0), phase)[0])

    quotients = [(loss(size) - loss(-size)) / (2 * size) for size in (1e-5, 1e-7)]
    return float(parts.sum()), (quotients[0], quotients[1]), float(parts.norm())


def _copy(learner: MetaLearner) -> MetaLearner:
    """A copy without autocast, which would round what is to be compared in float64."""
    twin = copied(learner)
    for module in twin.modules():
        if isinstance(module, FunctionalModule):
            module.autocast = None
    return twin


def _double(task: Task) -> Task:
    return Task(*(t.double() if t.is_floating_point() else t for t in task))
