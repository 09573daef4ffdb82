"""Trials in this process, one after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

from metahpo.searchers.executors.base import Died, Event, Executor, Finished, Objective, Reported, run_job
from metahpo.searchers.trial import Job


@contextmanager
def _begun(job: Job) -> Iterator[bool]:
    """Leaves a file behind if the process dies inside; gives whether one did, without a result."""
    if job.result is None:
        yield False
        return
    file = job.result.with_suffix(".begun")
    file.parent.mkdir(parents=True, exist_ok=True)
    before = file.exists() and not job.result.exists()
    try:
        file.touch()
        yield before
    finally:
        file.unlink(missing_ok=True)


class Serial(Executor):
    """Runs each trial where the study is.

    Ctrl-C lets a plain function end and asks a training to save itself; a second one stops either at once. A trial that
    ends this very process counts as one whose worker died.
    """

    def start(self, objective: Objective, folder: Path | None) -> None:
        self._objective, self._jobs = objective, list[Job]()

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self, emit: Callable[[Event], None], seconds: float) -> None:
        if self._jobs:
            job = self._jobs.pop(0)
            # The objective may change it: all that is relative is meant from here.
            with _begun(job) as before, chdir(os.getcwd()):
                if before:
                    emit(Died(job.number, "with the study's own process"))
                    return
                result = run_job(self._objective, job, lambda step, score: emit(Reported(job.number, step, score)))
            emit(Finished(job.number, result))

    def stop(self, grace: float) -> None:
        self._jobs.clear()
