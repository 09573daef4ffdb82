"""Searches over one small training on the bundled glyphs, each kept as a study, and what the studies show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metahpo.building import build_for
from metahpo.config_file import load_config
from metahpo.searchers import (
    ASHA,
    BOHB,
    Choice,
    Float,
    Hyperband,
    Int,
    Random,
    Searcher,
    Space,
    Study,
    SuccessiveHalving,
    TrialRecord,
)
from metahpo.searchers.training_objective import TrainingObjective
from metahpo.training.ensemble import evaluate_run

CONTROL = "random"
SPACE = Space(
    {
        "learner.inner_lr": Float(1e-3, 3, log=True),
        "learner.steps": Int(1, 3),
        "net.hidden": Choice([32], [64], [128], [64, 64], [128, 128]),
        "training.lr": Float(1e-4, 0.1, log=True),
        "training.optimizer": Choice("Adam", "SGD"),
        "training.clip_norm": Float(0.1, 10, log=True),
    }
)


@dataclass(frozen=True)
class Scale:
    """trainings: the full ones of random search, each of ``epochs``; share: the part of all its epochs that each other
    searcher has; least, eta: the lowest rung and the ratio of the ladder."""

    epochs: int = 27
    trainings: int = 30
    share: float = 1 / 3
    least: int = 1
    eta: float = 3
    iterations: int = 6
    val_tasks: int = 40
    test_tasks: int = 400

    @property
    def budget(self) -> float:
        """Epochs that a searcher other than random search has."""
        return self.trainings * self.epochs * self.share

    def config(self) -> dict[str, Any]:
        return {
            "data": {"source": "glyphs", "ways": 5, "shots": 1, "queries": 5},
            "net": "mlp",
            "learner": "maml",
            "training": {
                "epochs": self.epochs,
                "iterations": self.iterations,
                "tasks": 8,
                "val_tasks": self.val_tasks,
                "test_tasks": self.test_tasks,
                "keep_best": 1,
                "engine": "vmap",
                "device": "cpu",
                "threads": 1,
            },
        }

    def searchers(self) -> dict[str, Searcher]:
        ladder = (self.least, self.epochs, self.eta)
        return {
            CONTROL: Random(),
            "successive_halving": SuccessiveHalving(*ladder),
            "hyperband": Hyperband(*ladder),
            "asha": ASHA(*ladder),
            "bohb": BOHB(*ladder),
        }


QUICK = Scale(epochs=4, trainings=4, share=2 / 3, eta=2, iterations=1, val_tasks=8, test_tasks=8)


def path(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name}-{seed}" / "study.db"


def search(scale: Scale, name: str, seed: int, folder: Path) -> None:
    """Runs the search to its end, or goes on with it. One worker: the searcher sees all results at once."""
    torch.set_num_threads(1)
    limit = {"trials": scale.trainings} if name == CONTROL else {"budget": scale.budget}
    with Study(SPACE, scale.searchers()[name], path(folder, name, seed), "maximize", seed, parallel=1) as study:
        study.optimize(TrainingObjective(scale.config()), max_failures=100, **limit)


@dataclass(frozen=True)
class Found:
    """A finished search: its trials; ``curve``: the accuracy of the best full training after so many epochs in all,
    wherever it rises; best: that one; epochs: all that were trained."""

    trials: list[TrialRecord]
    curve: list[tuple[float, float]]
    best: TrialRecord | None
    epochs: float

    def reached(self, accuracy: float) -> float | None:
        """After how many epochs a full training had that accuracy."""
        return next((epochs for epochs, found in self.curve if found >= accuracy), None)


def found(scale: Scale, name: str, seed: int, folder: Path) -> Found:
    study = Study.open(path(folder, name, seed))
    epochs, best, curve = 0.0, None, []
    for record in study.trials:
        epochs += added(scale, study.trials, record)
        # A last trial that was begun within the budget and went beyond it does not count.
        within = name == CONTROL or epochs <= scale.budget
        full = record.score is not None and (record.budget or scale.epochs) == scale.epochs
        if within and full and (best is None or record.score > best.score):
            best = record
            curve.append((epochs, record.score))
    study.close()
    return Found(study.trials, curve, best, epochs)


def added(scale: Scale, trials: list[TrialRecord], record: TrialRecord) -> float:
    """Epochs that a trial trained: all of its budget, or what came after its parent."""
    before = 0 if record.parent is None else trials[record.parent].budget
    return (record.budget or scale.epochs) - (before or 0)


def tested(scale: Scale, record: TrialRecord, name: str, seed: int, folder: Path) -> float:
    """The accuracy of a trial's best checkpoint on the test tasks, which no search saw."""
    torch.set_num_threads(1)
    run = path(folder, name, seed).with_suffix(".files") / "trials" / f"{record.number:05d}" / "run"
    config = load_config(run / "config.yaml")
    tasks, learner = build_for(config, "test")
    return evaluate_run(run, learner, tasks, scale.test_tasks, config.training)["best"]["accuracy"]


def broken_promotions(trials: list[TrialRecord]) -> Iterator[str]:
    """What in the log of a search speaks against its promoted trials having gone on from their parents' checkpoints."""
    for record in trials:
        if record.parent is None or record.state != "complete":
            continue
        parent = trials[record.parent]
        begun, whole = parent.budget or 0, record.budget or 0
        resumed = record.notes["resumed_from"] or {}
        facts = {
            "has other settings": record.settings != parent.settings,
            "began from no checkpoint of its parent": not str(resumed.get("checkpoint")).startswith(
                f"{parent.number:05d}/"
            ),
            f"did not begin after epoch {begun}": resumed.get("epoch") != begun,
            f"did not train {whole - begun} epochs": record.notes["epochs_trained"] != whole - begun,
            f"reported other epochs than {begun + 1} to {whole}": sorted(record.reports)
            != list(range(int(begun) + 1, int(whole) + 1)),
        }
        yield from (f"trial {record.number} {what}" for what, wrong in facts.items() if wrong)


def same_curves(trials: list[TrialRecord], uninterrupted: list[TrialRecord]) -> tuple[int, int]:
    """How many promoted trials were also trained in one go by random search, and how many of these have its very curve.

    The first settings of a search are random search's with the same seed.
    """
    compared = same = 0
    for record in trials:
        chain = [record]
        while chain[0].parent is not None:
            chain.insert(0, trials[chain[0].parent])
        first = chain[0].number
        if len(chain) == 1 or record.state != "complete" or first >= len(uninterrupted):
            continue
        whole = uninterrupted[first]
        if whole.settings == record.settings:
            compared += 1
            curve = {epoch: score for part in chain for epoch, score in part.reports.items()}
            same += curve == {epoch: score for epoch, score in whole.reports.items() if epoch <= (record.budget or 0)}
    return compared, same
