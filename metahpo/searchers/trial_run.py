"""One training of a trial, kept in a run directory like any other."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from metahpo.building import build, resume_trainer
from metahpo.config import RunConfig
from metahpo.config_file import dump_config, load_config
from metahpo.errors import CheckpointError, ConfigError, DataError
from metahpo.runs.files import read_json, write_json
from metahpo.tasks import LabelledImages
from metahpo.training.checkpoint import CheckpointStore, load_checkpoint, load_learner, position, write_atomically
from metahpo.training.metrics import Row, best_epochs
from metahpo.training.trainer import Trainer

SPLITS = ("train", "val")


class TrialRun:
    """The training in ``run_dir``: begun, gone on with after its worker died, or gone on with from ``parent``'s.

    run_dir is a whole run directory, which ``metahpo evaluate`` and ``metahpo train --resume`` take. Its config.yaml
    has the engine that auto chose and the number of threads written out, on which rounding depends. images: in place of
    the config's data.
    """

    def __init__(self, run_dir: Path, parent: Path | None, config: RunConfig, images: LabelledImages | None):
        self.run_dir = run_dir
        if parent is not None and not run_dir.exists():
            _go_on_from(parent, run_dir)
        if (run_dir / "config.yaml").exists():
            self.config = self._kept(config)
            self.trainer = resume_trainer(self.config, run_dir, SPLITS, images)
        else:
            self.trainer = self._begin(config, images)
        self._state: dict[str, Any] = _read(run_dir / "trial.json")
        if parent is not None and self.resumed_from is None:
            raise CheckpointError(f"{run_dir / 'trial.json'} is gone; remove the trial's folder")

    def _begin(self, config: RunConfig, images: LabelledImages | None) -> Trainer:
        tasks, learner = build(config, SPLITS, images)
        pinned = {
            "engine": Trainer(learner, tasks["train"], tasks["val"], config.training).settled_engine(),
            "threads": config.training.threads or torch.get_num_threads(),
        }
        self.config = config.model_copy(update={"training": config.training.model_copy(update=pinned)})
        self.run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(self.run_dir / "config.yaml", dump_config(self.config).encode())
        return Trainer(learner, tasks["train"], tasks["val"], self.config.training, self.run_dir)

    def _kept(self, asked: RunConfig) -> RunConfig:
        """The config in the run directory, which should be that asked for."""
        try:
            kept = load_config(self.run_dir / "config.yaml")
        except ConfigError as error:
            # It was valid when it was written.
            raise CheckpointError(f"damaged: {error}") from None
        if kept != pinned(asked, kept):
            # No fault of the trial's settings: the search stops and the trial is tried again.
            raise CheckpointError(
                f"{self.run_dir} holds a run with another config; remove it, or search in another folder"
            )
        return kept

    def fit(self, updates: int, on_epoch: Callable[[Row], None]) -> None:
        """Trains up to ``updates`` outer updates in all; on_epoch: called with each new row."""
        before, start = self.seconds, time.perf_counter()

        def note() -> None:
            self._state["seconds"] = before + time.perf_counter() - start
            write_json(self.run_dir / "trial.json", self._state)

        def after(row: Row) -> None:
            note()
            on_epoch(row)

        try:
            self.trainer.fit(on_epoch=after, until_iteration=updates)
        finally:
            note()

    def best(self) -> Row:
        """The row of the best epoch by validation, which ``metahpo train`` tests; of an unfinished epoch's end too."""
        rows = list(self.trainer.history)
        if self.trainer.iteration:
            found = self.trainer.evaluate(self.trainer.val_tasks, self.config.training.val_tasks)
            rows.append({"epoch": self.trainer.epoch + 1, **{f"val_{name}": value for name, value in found.items()}})
        best = best_epochs(rows, 1)[0]
        return next(row for row in rows if row["epoch"] == best)

    def as_of(self, row: Row) -> Trainer:
        """The trainer with the learner that ``best`` gave the row of. Training does not go on from it."""
        if row["epoch"] <= len(self.trainer.history) and row is not self._last():
            path = CheckpointStore(self.run_dir / "checkpoints").of_epoch(int(row["epoch"]))
            load_learner(self.trainer.learner, load_checkpoint(path)["learner"], path)
        return self.trainer

    def _last(self) -> Row | None:
        """The row of the learner as it is."""
        return self.trainer.history[-1] if self.trainer.history and not self.trainer.iteration else None

    @property
    def seconds(self) -> float:
        """What training took so far, its parents' included."""
        return self._state.get("seconds", 0.0)

    @property
    def resumed_from(self) -> dict[str, Any] | None:
        """The parent's checkpoint: its file, and after how many epochs and iterations of the next it was taken."""
        return self._state.get("resumed_from")

    @property
    def first_update(self) -> int:
        """The number of outer updates that the parent had done."""
        start = self.resumed_from
        return start["epoch"] * self.config.training.iterations + start["iteration"] if start else 0


def pinned(asked: RunConfig, kept: RunConfig) -> RunConfig:
    """The config asked for, with the engine and the threads that a run of it was begun with."""
    chosen = {key: getattr(kept.training, key) for key in ("engine", "threads")}
    return asked.model_copy(update={"training": asked.training.model_copy(update=chosen)})


def _go_on_from(parent: Path, run_dir: Path) -> None:
    """Makes ``run_dir`` a copy of the parent's run; whole or not at all."""
    store = CheckpointStore(parent / "checkpoints")
    try:
        newest, _, _ = store.latest()
    except CheckpointError as error:
        raise CheckpointError(f"{run_dir} should go on from the trial in {parent.parent}: {error}") from None
    temporary = run_dir.with_name(f".{run_dir.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "checkpoints").mkdir(parents=True)
    files = [path for path in (parent / "config.yaml", parent / "metrics.csv") if path.exists()]
    for path in [*files, *store.list()]:
        _link(path, temporary / path.relative_to(parent))
    epoch, iteration = position(newest)
    where = str(newest.relative_to(parent.parents[1]))
    state = _read(parent / "trial.json")
    state["resumed_from"] = {"checkpoint": where, "epoch": epoch, "iteration": iteration}
    write_json(temporary / "trial.json", state)
    os.rename(temporary, run_dir)


def _link(source: Path, target: Path) -> None:
    """A second name of a file (run directories replace files, never change them), or a copy where there can be none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _read(path: Path) -> dict[str, Any]:
    try:
        state = read_json(path) or {}
    except DataError as error:
        raise CheckpointError(f"{error}; remove the trial's folder") from None
    if _number(state.get("seconds", 0.0)) and _start(state.get("resumed_from")):
        return state
    raise CheckpointError(f"{path} is damaged: it is not what a trial writes; remove the trial's folder")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _start(value: Any) -> bool:
    """Whether that is what ``resumed_from`` gives."""
    if value is None:
        return True
    whole = isinstance(value, dict) and all(type(value.get(name)) is int for name in ("epoch", "iteration"))
    return whole and isinstance(value.get("checkpoint"), str)
