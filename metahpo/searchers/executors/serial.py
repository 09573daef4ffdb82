"""Trials in this process, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from metahpo.searchers.executors.base import Event, Executor, Finished, Objective, Reported, run_job
from metahpo.searchers.trial import Job


class Serial(Executor):
    """Runs each trial where the study is; Ctrl-C reaches the objective itself."""

    def start(self, objective: Objective, folder: Path | None) -> None:
        self._objective, self._jobs = objective, list[Job]()

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self, emit: Callable[[Event], None], seconds: float) -> None:
        if self._jobs:
            job = self._jobs.pop(0)
            result = run_job(self._objective, job, lambda step, score: emit(Reported(job.number, step, score)))
            emit(Finished(job.number, result))

    def stop(self, grace: float) -> None:
        self._jobs.clear()
