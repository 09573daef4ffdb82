"""Running a learner over fixed tasks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import torch
from torch import Tensor

from metahpo.errors import DataError
from metahpo.functional.trees import join, map_tree
from metahpo.learners.base import MetaLearner
from metahpo.learners.phase import Phase
from metahpo.tasks.task import TaskSource
from metahpo.training.distributed import current
from metahpo.training.engines import ENGINES, Engine
from metahpo.training.environment import intra_op_threads, progress, seeded
from metahpo.training.precision import precision
from metahpo.training.prefetch import batches_of
from metahpo.training.settings import TrainingSettings


def evaluate(
    learner: MetaLearner,
    tasks: TaskSource,
    count: int,
    settings: TrainingSettings,
    engine: Engine | None = None,
    title: str = "evaluating",
    each: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Runs the first ``count`` tasks: metrics by name, [count], and query outputs by kind, [count, N, ...], on the CPU.

    engine: the settings' by default. each: called after every batch of tasks. Randomness, if a learner draws any,
    follows the settings' seed. Ranks share the tasks of each batch, and all get all results.
    """
    with intra_op_threads(settings.threads):
        return _evaluate(learner, tasks, count, settings, engine or ENGINES[settings.engine](), title, each)


def _evaluate(
    learner: MetaLearner,
    tasks: TaskSource,
    count: int,
    settings: TrainingSettings,
    engine: Engine,
    title: str,
    each: Callable[[], None],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    device, size = settings.torch_device(), settings.tasks
    metrics: list[dict[str, Tensor]] = []
    outputs: list[dict[str, Tensor]] = []
    ranks, done = current(), list[int]()
    starts = range(0, count, size)
    shares = (ranks.share(range(first, min(first + size, count))) for first in starts)
    with progress(title, count) as bar, closing(batches_of(tasks, shares, device)) as batches:
        for first, (numbers, batch) in zip(starts, batches):
            with seeded(settings.seed, first, *ranks.seed, device=device), precision(learner, settings):
                found, answers = engine.evaluate(learner, batch, Phase())
            metrics.append(found)
            outputs.append(answers)
            done += numbers
            bar.update(min(size, count - first))
            each()
    return ranks.in_order(done, _joined(metrics)), ranks.in_order(done, _joined(outputs))


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    shapes = [map_tree(lambda value: value.shape[1:], part) for part in parts]  # type: ignore[arg-type,return-value]
    if any(shape != shapes[0] for shape in shapes):
        raise DataError("tasks of different sizes (ways and shots in a range) train, but cannot be evaluated together")
    return {name: join(lambda rows: torch.cat(rows).cpu(), [part[name] for part in parts]) for name in parts[0]}
