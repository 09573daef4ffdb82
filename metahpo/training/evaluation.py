"""Running a learner over fixed tasks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metahpo.learners.base import MetaLearner
from metahpo.learners.phase import Phase
from metahpo.tasks.task import TaskSource
from metahpo.training.engines import ENGINES
from metahpo.training.environment import progress, seeded
from metahpo.training.precision import precision
from metahpo.training.settings import TrainingSettings


def evaluate(
    learner: MetaLearner,
    tasks: TaskSource,
    count: int,
    settings: TrainingSettings,
    title: str = "evaluating",
    each: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Runs the first ``count`` tasks: metrics by name, [count], and query outputs by kind, [count, N, ...], on the CPU.

    each: called after every batch of tasks. Randomness, if a learner draws any, follows the settings' seed.
    """
    engine, device, size = ENGINES[settings.engine](), settings.torch_device(), settings.tasks
    metrics: list[dict[str, Tensor]] = []
    outputs: list[dict[str, Tensor]] = []
    with progress(title, count) as bar:
        for first in range(0, count, size):
            numbers = range(first, min(first + size, count))
            batch = tasks.batch(numbers).to(device, non_blocking=True)
            with seeded(settings.seed, first, device=device), precision(learner, settings):
                found, answers = engine.evaluate(learner, batch, Phase())
            metrics.append(found)
            outputs.append(answers)
            bar.update(len(numbers))
            each()
    return _joined(metrics), _joined(outputs)


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
