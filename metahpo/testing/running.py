"""Searches as the checks run them: in this process, in memory, with results in any order."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from metahpo.searchers.base import Searcher
from metahpo.searchers.executors.base import Event, Executor, Finished, Reported, run_job
from metahpo.searchers.records import TrialRecord
from metahpo.searchers.space import Space
from metahpo.searchers.study import Study
from metahpo.searchers.trial import Job
from metahpo.testing.problems import Objective

# Which of so many trials at work ends next.
Order = Callable[[int], int]
ENDLESS = 10**9


def run(
    searcher: Searcher,
    space: Space,
    objective: Objective,
    trials: int,
    *,
    seed: int = 0,
    workers: int = 1,
    order: Order = lambda working: 0,
    directions: Sequence[Any] = ("minimize",),
) -> list[TrialRecord]:
    """The trials of a search, which goes on up to ``trials`` of them whatever fails."""
    with Study(space, searcher, None, directions, seed) as study:
        study.optimize(objective, trials, Ordered(workers, order), max_failures=ENDLESS)
        return study.trials


def opened_anew(closed: Study, searcher: Searcher) -> Study:
    """A study that knows of a closed one what its store holds, plain values all, as if read from a file."""
    study = Study(closed.space, searcher, None, closed.directions, closed.seed)
    study._store = closed._store
    study._begin()
    return study


class Ordered(Executor):
    """Holds up to ``workers`` trials and ends the one that ``order`` picks."""

    def __init__(self, workers: int = 1, order: Order = lambda working: 0):
        self.workers, self.order = workers, order

    def start(self, objective: Any, folder: Path | None) -> None:
        self._objective, self._jobs = objective, list[Job]()

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self, emit: Callable[[Event], None], seconds: float) -> None:
        job = self._jobs.pop(self.order(len(self._jobs)))
        result = run_job(self._objective, job, lambda step, score: emit(Reported(job.number, step, score)))
        emit(Finished(job.number, result))

    def stop(self, grace: float) -> None:
        self._jobs.clear()


def told(record: TrialRecord) -> str:
    """What was suggested, as text."""
    more = {name: getattr(record, name) for name in ("budget", "parent") if getattr(record, name) is not None}
    return " ".join([json.dumps(record.settings), *(f"{name} {value}" for name, value in more.items())])


def difference(first: Sequence[TrialRecord], second: Sequence[TrialRecord]) -> tuple[int, str, str] | None:
    """The number of the first trial that is not the same in both, and the trial in each; None if all are."""
    for number in range(max(len(first), len(second))):
        pair = [told(records[number]) if number < len(records) else "none" for records in (first, second)]
        if pair[0] != pair[1]:
            return number, pair[0], pair[1]
    return None
