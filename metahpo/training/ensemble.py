"""Testing with the best checkpoints together."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from metahpo.errors import CheckpointError, DataError
from metahpo.functional.trees import join, map_tree, stack_trees
from metahpo.learners.base import MetaLearner
from metahpo.tasks.task import TaskSource
from metahpo.training.checkpoint import CheckpointStore, DamagedCheckpoint, State, load_checkpoint, load_learner
from metahpo.training.distributed import current
from metahpo.training.engines import ENGINES
from metahpo.training.evaluation import evaluate
from metahpo.training.metrics import CsvLog, Row, best_epochs, summarise
from metahpo.training.settings import TrainingSettings


def evaluate_run(
    run_dir: str | Path, learner: MetaLearner, tasks: TaskSource, count: int, settings: TrainingSettings
) -> dict[str, Row]:
    """Tests a run's best checkpoint by validation ("best") and its best ones together ("ensemble of k").

    The ensemble averages the outputs of each checkpoint's adapted net (Antoniou et al. 2019, section 5; the authors'
    program takes 5, the paper 3; ours ``settings.keep_best``), if the learner's can be. Rows hold means and 95%
    intervals. Leaves ``learner`` as the best checkpoint.
    """
    learner.to(settings.torch_device())
    ranks = current()
    best = ranks.on_first(lambda: best_states(run_dir, settings.keep_best if learner.averages else 1))
    metrics: dict[str, torch.Tensor] = {}
    total: dict[str, torch.Tensor] = {}
    engine = ENGINES[settings.engine]()
    # The best one last, so that the learner is left as it.
    for rank, (path, state) in enumerate(reversed(best), start=1):
        with ranks.agreed():
            load_learner(learner, state["learner"], path)
        metrics, outputs = evaluate(learner, tasks, count, settings, engine, f"testing {rank}/{len(best)}")
        total = {kind: join(sum, [total[kind], value]) if total else value for kind, value in outputs.items()}
    rows: dict[str, Row] = {"best": {"epoch": best[0][1]["epoch"], **summarise(metrics)}}
    if len(best) > 1:
        rows[f"ensemble of {len(best)}"] = summarise(_judge(learner, total, len(best), tasks, count))
    return rows


def load_best(run_dir: str | Path, learner: MetaLearner) -> int:
    """Loads a run's best checkpoint by validation into ``learner``; returns its epoch."""
    [(path, state)] = best_states(run_dir, 1)
    load_learner(learner, state["learner"], path)
    return state["epoch"]


def best_states(run_dir: str | Path, count: int) -> list[tuple[Path, State]]:
    """The ``count`` best epochs' checkpoints by validation, best first; damaged ones are named and passed over."""
    store = CheckpointStore(Path(run_dir) / "checkpoints")
    newest, state, damaged = store.latest()
    for line in damaged:
        print(f"{line}; going on from {newest.name}", file=sys.stderr)
    history = state["history"]
    if not history:
        raise CheckpointError(f"{run_dir} has no whole epoch yet")
    log = CsvLog(Path(run_dir) / "metrics.csv")
    if not damaged:
        _say_if_gone(log, newest, len(history))
    log.restore(history)
    whole = dict(_whole(store, best_epochs(history, count)))
    if not whole:
        raise CheckpointError(f"{run_dir}: the checkpoints of its best epochs are all gone or damaged")
    return list(whole.items())


def _say_if_gone(log: CsvLog, newest: Path, epochs: int) -> None:
    """Says that the newest checkpoint is not the run's: an epoch is logged after its checkpoint is there."""
    try:
        logged = len(log.read())
    except DataError:
        return  # The log is said to be damaged when it is restored.
    if logged > epochs:
        gone = newest.with_name(f"epoch-{logged:04d}")
        print(f"{gone} is gone: {log.path} has {logged} rows; going on from {newest.name}", file=sys.stderr)


def _whole(store: CheckpointStore, epochs: list[int]) -> Iterator[tuple[Path, State]]:
    for epoch in epochs:
        try:
            path = store.of_epoch(epoch)
            yield path, load_checkpoint(path)
        except DamagedCheckpoint as error:
            print(f"{error}; left out", file=sys.stderr)


def _judge(learner: MetaLearner, total: dict[str, torch.Tensor], models: int, tasks: TaskSource, count: int):
    rows = []
    for index in range(count):
        means = map_tree(lambda value, row=index: value[row] / models, total)
        rows.append(learner.judge(means, tasks.task(index).query_y.cpu()))
    return stack_trees(rows)
