"""A trial as its objective sees it, in whatever process that runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metahpo.checks import check_whole, plain, refuse
from metahpo.errors import SearchArgumentError
from metahpo.searchers.space import Settings


@dataclass(frozen=True)
class Job:
    """What a worker is sent of a trial. folder: the trial's own, None where the study keeps none."""

    number: int
    settings: Settings
    seed: int
    budget: float | None = None
    folder: Path | None = None
    parent_folder: Path | None = None
    # Where the result is left until the study has it; also the name of the lock that one worker alone holds.
    result: Path | None = None
    attempt: int = 0
    parent: int | None = None


class Trial:
    """One trial: ``trial["name"]`` or ``trial.settings["name"]`` is what was suggested.

    budget: how far to train in all, in the search's units (epochs, ...); None: fully. seed: for the objective's own
    randomness, from the study's seed and the trial's number. folder: for checkpoints and the like; the same one when a
    trial is run again because its worker died (``attempt`` counts from 0). parent: the number of the trial whose
    checkpoint this one should go on from, or None; parent_folder: its folder, None where the study keeps none.
    """

    def __init__(self, job: Job, emit: Callable[[int, float], None]):
        self.number, self.settings, self.budget, self.seed = job.number, dict(job.settings), job.budget, job.seed
        self.attempt, self.parent, self.parent_folder = job.attempt, job.parent, job.parent_folder
        self.reports: dict[int, float] = {}
        self._folder, self._emit = job.folder, emit
        # What of: a study does not take another one's.
        self.study: object = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def __getitem__(self, name: str) -> Any:
        return self.settings[name]

    @property
    def folder(self) -> Path:
        """Made when first asked for; a temporary one where the study is kept in memory."""
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="metahpo-trial-")
            self._folder = Path(self._temporary.name)
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def report(self, step: int, score: float) -> None:
        """Tells the study the score after ``step`` (an epoch, ...).

        An attempt that goes on from what another one kept should tell of that one's steps again: what was told just
        before a process died may be lost.
        """
        step = check_whole("trial.report", "step", step, at_least=0, error=SearchArgumentError)
        try:
            value = number(score)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            refuse("trial.report", "score", score, "a number", SearchArgumentError)
        self.reports[step] = value
        self._emit(step, value)


def number(score: Any) -> float:
    """A score as a float; raises TypeError, ValueError or OverflowError for what is none."""
    if isinstance(plain(score), (bool, str, bytes)):
        raise TypeError("what reads as a number is a mistake all the same")
    return float(score)
