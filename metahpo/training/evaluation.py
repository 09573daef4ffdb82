"""Running a learner over fixed tasks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext
from typing import Any

import torch
from torch import Tensor

from metahpo.checks import check_type, check_whole, refuse
from metahpo.errors import ConfigArgumentError, DataArgumentError, DataError, NetArgumentError
from metahpo.functional.trees import join, map_tree
from metahpo.learners.base import MetaLearner
from metahpo.learners.phase import Phase
from metahpo.tasks.task import TaskSource
from metahpo.training.alone import without_false_inductive
from metahpo.training.distributed import current
from metahpo.training.engines import ENGINES, Engine
from metahpo.training.environment import intra_op_threads, progress, seeded
from metahpo.training.first_batch import check_batch, check_outputs, check_reaches, explained
from metahpo.training.metrics import filled
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
    follows the settings' seed. Ranks take over rank 0's weights and buffers, share the tasks of each batch, and all get
    all results.
    """
    check_parts(evaluate, learner, settings, tasks=tasks)
    count = check_whole("evaluate", "count", count, at_least=1, error=ConfigArgumentError)
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
    check_reaches("tasks", tasks, count)
    device, size = settings.torch_device(), settings.tasks
    metrics: list[dict[str, Tensor]] = []
    outputs: list[dict[str, Tensor]] = []
    ranks, done = current(), list[int]()
    ranks.share_state(learner)
    starts = range(0, count, size)
    shares = (ranks.share(range(first, min(first + size, count))) for first in starts)
    with progress(title, count) as bar, closing(batches_of(tasks, shares, device)) as batches:
        for first, (numbers, batch) in zip(starts, batches):
            if not first:
                check_batch(tasks, batch, numbers)
                with seeded(settings.seed, device=device):
                    check_outputs(learner, batch, Phase())
            with (
                seeded(settings.seed, first, *ranks.seed, device=device),
                precision(learner, settings),
                nullcontext() if first else explained(learner, batch),
            ):
                found, answers = engine.evaluate(learner, batch, Phase())
                found, answers = without_false_inductive(learner, batch, found, answers, ranks)
            metrics.append(found)
            outputs.append(answers)
            done += numbers
            bar.update(min(size, count - first))
            each()
    return ranks.in_order(done, _joined(filled(metrics))), ranks.in_order(done, _joined(outputs))


def check_parts(owner: object, learner: Any, settings: Any, **sources: Any) -> None:
    """Raises ArgumentError unless the parts of a training or evaluation are what their names say."""
    whose = "evaluate" if owner is evaluate else owner
    check_type(whose, "learner", learner, MetaLearner, "a MetaLearner", error=NetArgumentError)
    expected = "TrainingSettings" if owner is evaluate else "TrainingSettings or None"
    kinds = (TrainingSettings,) if owner is evaluate else (TrainingSettings, type(None))
    check_type(whose, "settings", settings, kinds, expected, error=ConfigArgumentError)
    for name, source in sources.items():
        if isinstance(source, type) or not isinstance(source, TaskSource):
            refuse(whose, name, source, "a TaskSource, with task(index) and batch(indices)", DataArgumentError)


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    shapes = [map_tree(lambda value: value.shape[1:], part) for part in parts]  # type: ignore[arg-type,return-value]
    if any(shape != shapes[0] for shape in shapes):
        raise DataError("tasks of different sizes (ways and shots in a range) train, but cannot be evaluated together")
    return {name: join(lambda rows: torch.cat(rows).cpu(), [part[name] for part in parts]) for name in parts[0]}
