"""The training loop as an objective."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any, Literal, get_args

import numpy as np

from metahpo.building_data import load_images
from metahpo.config import RunConfig
from metahpo.config_episodes import EpisodeSettings
from metahpo.config_file import load_config, located, validate
from metahpo.errors import SearchError, did_you_mean
from metahpo.searchers.outcome import Outcome
from metahpo.searchers.rate_gradient import rate_gradient
from metahpo.searchers.run_settings import run_tree, trial_config
from metahpo.searchers.trial import Trial
from metahpo.searchers.trial_run import TrialRun, pinned
from metahpo.tasks import LabelledImages, Task
from metahpo.training.metrics import Row, score

Fidelity = Literal["epochs", "iterations", "tasks", "data"]
# What a trial can be judged by, and which way is better.
OBJECTIVES = {"accuracy": "maximize", "loss": "minimize", "seconds": "minimize", "parameters": "minimize"}
# What a gradient can be had of.
RATE = "learner.inner_lr"


class TrainingObjective:
    """Trains as ``config`` says, with a trial's settings in place of the keys they name; gives the validation score.

    config: a ``RunConfig``, a plain tree, or the path of a YAML file. A setting's name is a dotted key of it
    (``learner.inner_lr``; ``learner`` itself with a name takes that learner's defaults). The run of a trial is kept in
    ``trial.folder / "run"``; it goes on there when its worker has died, to the same result bit for bit.

    The score is the best epoch's: what ``metahpo train`` picks its checkpoint by, so that training with the run's
    config.yaml gives the very figure. Trials of one budget all have as many epochs to choose from.

    fidelity: what a trial's budget counts: "epochs"; "iterations", outer updates in all; "tasks", those seen in all;
    "data", the fraction of the training classes to draw from, with the same fraction of all updates. Schedules are
    those of the full training whatever the budget. A trial with a parent goes on from that one's newest checkpoint.
    objectives: "accuracy", "loss", "seconds" (of training, kept across resuming) and "parameters" (that the outer loop
    learns); the first is what searchers with one go by. seeds: so many trainings, with training.seed and those after
    it, or folds: k-fold cross-validation over the classes of train and val; the scores are their means. gradients: give
    the loss's gradient with respect to the setting ``learner.inner_lr`` too, for the searchers that use it
    (``rate_gradient``: at the learner that the score is of); the first objective should be the loss.

    Raises SearchError.
    """

    def __init__(
        self,
        config: RunConfig | Mapping[str, Any] | str | Path,
        *,
        fidelity: Fidelity = "epochs",
        objectives: Sequence[str] = ("accuracy",),
        seeds: int = 1,
        folds: int | None = None,
        gradients: bool = False,
    ):
        self.tree, self.fidelity = run_tree(config), fidelity
        # Where relative paths begin, in whatever working directory a trial runs.
        self._here = Path.cwd()
        self.objectives: tuple[str, ...] = (objectives,) if isinstance(objectives, str) else tuple(objectives)
        self.seeds, self.folds, self.gradients = seeds, folds, gradients
        if fidelity not in get_args(Fidelity):
            raise SearchError(f"fidelity: {did_you_mean(str(fidelity), get_args(Fidelity))} found {fidelity!r}")
        for name in self.objectives:
            if name not in OBJECTIVES:
                raise SearchError(f"objectives: no objective {name!r}; {did_you_mean(str(name), OBJECTIVES)}")
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise SearchError(f"objectives: should be different ones, at least one, found {list(self.objectives)}")
        if seeds < 1 or (folds is not None and folds < 2):
            raise SearchError(f"seeds should be at least 1 and folds at least 2, found {seeds} and {folds}")
        if seeds > 1 and folds is not None:
            raise SearchError("seeds and folds: one of them should be left out")
        if gradients and self.objectives[0] != "loss":
            raise SearchError(f"gradients: are of the loss; the first of objectives is {self.objectives[0]}")

    @property
    def directions(self) -> list[str]:
        """What ``Study`` is to do with each objective: maximize or minimize."""
        return [OBJECTIVES[name] for name in self.objectives]

    @property
    def full_budget(self) -> float:
        """The budget of a training as the config has it."""
        training = validate(self.tree, "config").training
        updates = training.epochs * training.iterations
        return {"epochs": training.epochs, "iterations": updates, "tasks": updates * training.tasks, "data": 1.0}[
            self.fidelity
        ]

    def config(self, settings: Mapping[str, Any]) -> RunConfig:
        """The config of a trial with these settings; raises ConfigError."""
        return trial_config(self.tree, settings, "trial")

    def check(self, example: Task) -> None:
        """Raises SearchError unless runs on tasks like ``example`` can be judged and trained as asked."""
        if "accuracy" in self.objectives and example.query_y.is_floating_point():
            raise SearchError("objective accuracy: the tasks are regression, which has none; choose loss")
        self._images(self.config({}), "run-fold-0", None)

    def kept_config(self, folder: Path | None, settings: Mapping[str, Any]) -> RunConfig:
        """The config of the run that a trial left in its folder (of several the first), with engine and threads as
        they were; that of the settings if there is no such folder."""
        config = self.config(settings)
        path = folder and folder / next(iter(self._parts(config))) / "config.yaml"
        kept = load_config(path) if path and path.exists() else config
        if kept == pinned(config, kept):
            return kept
        print(f"{path} is damaged: it is not the config of the trial's settings, which is taken", file=sys.stderr)
        return config

    def __call__(self, trial: Trial) -> Outcome:
        if trial.parent is not None and trial.parent_folder is None:
            raise SearchError(
                f"trial {trial.number} should go on from trial {trial.parent}, but a study in memory keeps no "
                "checkpoints; give it a storage or a folder"
            )
        config = self.config(trial.settings)
        parts = self._parts(config)
        curves: list[dict[int, float]] = []
        scores, notes, slopes = [], [], []
        for name, own in parts.items():
            run = TrialRun(
                trial.folder / name,
                trial.parent_folder and trial.parent_folder / name,
                own,
                self._images(own, name, trial.budget),
            )
            curves.append({})
            self._train(run, trial, curves, report=len(curves) == len(parts))
            best = run.best()
            scores.append(self._scores(run, best))
            notes.append(_notes(run, best))
            if self.gradients and RATE in trial.settings:
                slopes.append(rate_gradient(run.as_of(best)))
        means = tuple(mean(values) for values in zip(*scores))
        more = {"each": dict(zip(parts, map(list, scores)))} if len(parts) > 1 else {}
        gradients = {RATE: mean(slopes)} if slopes else {}
        return Outcome(means[0] if len(means) == 1 else means, gradients, {**notes[0], **more})

    def _train(self, run: TrialRun, trial: Trial, curves: list[dict[int, float]], report: bool) -> None:
        """Trains to the trial's budget. The last of several trainings reports the means of all."""
        judged = next((name for name in self.objectives if name in ("accuracy", "loss")), None)

        def note(row: Row) -> None:
            epoch = int(row["epoch"])
            value = row[f"val_{judged}"] if judged else score(row)
            curves[-1][epoch] = value
            if report and epoch * run.config.training.iterations > run.first_update:
                trial.report(epoch, mean(curve[epoch] for curve in curves))

        self.check(run.trainer.val_tasks.task(0))
        for row in run.trainer.history:
            note(row)
        run.fit(self._updates(run.config, trial.budget), note)

    def _scores(self, run: TrialRun, best: Row) -> tuple[float, ...]:
        count = sum(p.numel() for p in run.trainer.learner.outer_params().values())
        found = {"seconds": run.seconds, "parameters": float(count)}
        return tuple(found[name] if name in found else best[f"val_{name}"] for name in self.objectives)

    def _updates(self, config: RunConfig, budget: float | None) -> int:
        """How many outer updates a budget is."""
        training = config.training
        full = training.epochs * training.iterations
        if budget is None:
            return full
        one = {"epochs": training.iterations, "iterations": 1, "tasks": 1 / training.tasks, "data": full}[self.fidelity]
        updates = round(budget) * one if self.fidelity == "epochs" else math.ceil(round(budget * one, 6))
        if updates > full:
            raise SearchError(
                f"a budget of {budget:g} ({self.fidelity}) is more than the config's full training, {full / one:g}"
            )
        return max(int(updates), training.iterations if self.fidelity == "epochs" else 1)

    def _parts(self, config: RunConfig) -> dict[str, RunConfig]:
        """The config of each training, by its folder's name."""
        if self.folds is not None:
            return {f"run-fold-{fold}": config for fold in range(self.folds)}
        if self.seeds == 1:
            return {"run": config}
        first = config.training.seed
        return {
            f"run-seed-{seed}": config.model_copy(
                update={"training": config.training.model_copy(update={"seed": seed})}
            )
            for seed in range(first, first + self.seeds)
        }

    def _images(self, config: RunConfig, part: str, budget: float | None) -> LabelledImages | None:
        """The images of a training with its own splits; None where they are the data's."""
        if not isinstance(config.data, EpisodeSettings):
            if self.folds is not None or self.fidelity == "data":
                what = "folds" if self.folds is not None else "fidelity data"
                raise SearchError(f"{what}: needs images with classes; data.source {config.data.source!r} has none")
            return None
        images = _loaded(type(config.data), located(config.data, self._here).model_dump_json())
        train, val = (tuple(images.splits[split]) for split in ("train", "val"))
        if self.folds is not None:
            mixed = _mixed((*train, *val), config.training.seed)
            fold = int(part.rpartition("-")[2])
            val = mixed[fold :: self.folds]
            train = tuple(c for c in mixed if c not in set(val))
        if self.fidelity == "data" and budget is not None and budget < 1:
            # The classes of a fraction are among those of a larger one.
            train = _mixed(train, config.training.seed)[: max(math.ceil(budget * len(train)), config.data.most_ways)]
        return replace(images, splits={**images.splits, "train": train, "val": val})


def _notes(run: TrialRun, best: Row) -> dict[str, Any]:
    """What is kept with a trial: the epochs of all the training, and of it what came after ``resumed_from``."""
    settings, updates = run.config.training, run.trainer.updates
    return {
        "epochs": updates / settings.iterations,
        "epochs_trained": (updates - run.first_update) / settings.iterations,
        "resumed_from": run.resumed_from,
        "best_epoch": int(best["epoch"]),
        "seconds": round(run.seconds, 3),
        "engine": settings.engine,
        "threads": settings.threads,
    }


def _mixed(classes: tuple[int, ...], seed: int) -> tuple[int, ...]:
    return tuple(int(c) for c in np.random.default_rng([seed, len(classes)]).permutation(np.array(classes)))


@lru_cache(maxsize=2)
def _loaded(kind: type[EpisodeSettings], settings: str) -> LabelledImages:
    """The images that a config's section ``data`` names, read once in a process; settings: the section as JSON."""
    return load_images(kind.model_validate_json(settings))
