"""The derivative of a trained learner's validation loss in its inner rates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from metahpo.errors import SearchError
from metahpo.inner import LayerStepRates
from metahpo.learners import MAML, MetaLearner, Phase
from metahpo.training.engines import ENGINES
from metahpo.training.environment import intra_op_threads, seeded
from metahpo.training.precision import precision
from metahpo.training.trainer import Trainer


def rate_gradient(trainer: Trainer) -> float:
    """d(mean loss over the validation tasks)/d(inner rate) of the trainer's learner as it is.

    The whole derivative through the inner loop, of second order, with the learnt initial weights held; where there are
    several rates (by layer and step), that of a shift of all by the same. Raises SearchError for a learner without.
    """
    learner, settings = trainer.learner, trainer.settings
    # Recording a program costs more than it gains in so few steps.
    engine = ENGINES[{"auto": "loop", "trace": "vmap", "graph": "vmap"}.get(settings.engine, settings.engine)]()
    total, count = 0.0, settings.val_tasks
    with _differentiable(learner) as names, intra_op_threads(settings.threads):
        for first in range(0, count, settings.tasks):
            numbers = range(first, min(first + settings.tasks, count))
            tasks = trainer.val_tasks.batch(numbers).to(trainer.device)
            with seeded(settings.seed, first, device=trainer.device), precision(learner, settings):
                grads = engine.meta_gradient(learner, tasks, Phase()).grads
            total += len(numbers) / count * sum(float(grads[name].sum()) for name in names)
    return total


@contextmanager
def _differentiable(learner: MetaLearner) -> Iterator[list[str]]:
    """Inside it the inner rates are among what the outer gradient is of; gives their names."""
    rate = _rate(learner)
    assert isinstance(learner, MAML)
    before = rate.requires_grad, learner.first_order
    rate.requires_grad_(True)
    learner.first_order = False
    try:
        yield [name for name, p in learner.named_parameters() if p is rate]
    finally:
        rate.requires_grad_(before[0])
        learner.first_order = before[1]


def _rate(learner: MetaLearner) -> nn.Parameter:
    rule = getattr(learner, "rule", None)
    rate = rule.rates if isinstance(rule, LayerStepRates) else getattr(rule, "lr", None)
    if not isinstance(learner, MAML) or not isinstance(rate, nn.Parameter):
        raise SearchError(f"gradients: learner {type(learner).__name__} has no inner rate to differentiate by")
    return rate
