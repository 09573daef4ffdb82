"""Testing with the best checkpoints together."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from metahpo.errors import CheckpointError
from metahpo.functional.trees import stack_trees
from metahpo.learners.base import MetaLearner
from metahpo.tasks.task import TaskSource
from metahpo.training.checkpoint import CheckpointStore, load_checkpoint, load_learner
from metahpo.training.metrics import Row, best_epochs, summarise
from metahpo.training.settings import TrainingSettings
from metahpo.training.trainer import evaluate


def evaluate_run(
    run_dir: str | Path, learner: MetaLearner, tasks: TaskSource, count: int, settings: TrainingSettings
) -> dict[str, Row]:
    """Tests a run's best checkpoint by validation ("best") and its best ones together ("ensemble of k").

    The ensemble averages the outputs of each checkpoint's adapted net (Antoniou et al. 2019, section 5; the authors'
    program takes 5, the paper 3; ours ``settings.keep_best``). Rows hold means and 95% intervals. Leaves ``learner`` as
    the best checkpoint.
    """
    learner.to(settings.torch_device())
    store, history = _history(run_dir)
    epochs = best_epochs(history, settings.keep_best)
    rows: dict[str, Row] = {}
    total: dict[str, torch.Tensor] = {}
    for rank, epoch in enumerate(reversed(epochs), start=1):
        path = store.of_epoch(epoch)
        load_learner(learner, load_checkpoint(path)["learner"], path)
        metrics, outputs = evaluate(learner, tasks, count, settings, f"testing {rank}/{len(epochs)}")
        total = {kind: total[kind] + value if total else value for kind, value in outputs.items()}
    rows["best"] = {"epoch": epochs[0], **summarise(metrics)}
    if len(epochs) > 1:
        rows[f"ensemble of {len(epochs)}"] = summarise(_judge(learner, total, len(epochs), tasks, count))
    return rows


def _judge(learner: MetaLearner, total: dict[str, torch.Tensor], models: int, tasks: TaskSource, count: int):
    rows = []
    for index in range(count):
        means = {kind: value[index] / models for kind, value in total.items()}
        rows.append(learner.judge(means, tasks.task(index).query_y.cpu()))
    return stack_trees(rows)


def load_best(run_dir: str | Path, learner: MetaLearner, settings: TrainingSettings) -> int:
    """Loads a run's best checkpoint by validation into ``learner``; returns its epoch."""
    store, history = _history(run_dir)
    epoch = best_epochs(history, 1)[0]
    path = store.of_epoch(epoch)
    load_learner(learner, load_checkpoint(path)["learner"], path)
    return epoch


def _history(run_dir: str | Path) -> tuple[CheckpointStore, list[Row]]:
    """A run's checkpoints, and its history by the newest whole one; damaged ones are named and passed over."""
    store = CheckpointStore(Path(run_dir) / "checkpoints")
    path, state, damaged = store.latest()
    for line in damaged:
        print(f"{line}; using {path.name}", file=sys.stderr)
    if not state["history"]:
        raise CheckpointError(f"{run_dir} has no whole epoch yet")
    return store, state["history"]
