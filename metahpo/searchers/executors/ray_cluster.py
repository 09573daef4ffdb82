"""Trials on the machines of a Ray cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle

from metahpo.errors import SearchError, one_line
from metahpo.searchers.executors.base import Died, Event, Executor, Finished, Objective, Reported, run_job
from metahpo.searchers.executors.processes import THREADS, shares
from metahpo.searchers.trial import Job


class Ray(Executor):
    """``workers`` Ray actors of ``threads`` CPUs (and ``gpus`` GPUs) each.

    address: that of a running cluster, or "auto" for the one this machine belongs to; None starts one on this machine
    alone. Every machine needs metahpo, the objective's modules, and the study's folder at the same path (a shared file
    system), where checkpoints and results are kept. An actor that dies is replaced.
    """

    def __init__(self, workers: int, threads: int | None = None, gpus: float = 0, address: str | None = None):
        self.workers, self.threads = shares(workers, threads)
        self.gpus, self.address = gpus, address
        self._actors: dict[int, Any] = {}
        # The trial and the answer to come of each place.
        self._busy: dict[int, tuple[Job, Any]] = {}
        self._started = False

    def start(self, objective: Objective, folder: Path | None) -> None:
        try:
            import ray
        except ImportError:
            raise SearchError('executor ray: Ray is not installed; pip install "metahpo[ray]"') from None
        self._ray = ray
        environment = dict.fromkeys(THREADS, str(self.threads))
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        if not ray.is_initialized():
            options: dict[str, Any] = {"address": self.address, "log_to_driver": False}
            if self.address is None:
                options |= {"num_cpus": self.workers * self.threads, "include_dashboard": False}
            try:
                ray.init(**options, runtime_env={"env_vars": environment})
            except Exception as error:
                raise SearchError(f"executor ray: no cluster at {self.address!r}: {one_line(error)}") from error
            self._started = True
        self._objective = ray.put(cloudpickle.dumps(objective))

    def submit(self, job: Job) -> None:
        place = next(i for i in range(self.workers) if i not in self._busy)
        if place not in self._actors:
            # A second thread answers ``reports`` while the first is in a trial.
            kind = self._ray.remote(num_cpus=self.threads, num_gpus=self.gpus, max_concurrency=2)(_Worker)
            self._actors[place] = kind.remote(self._objective, self.threads)
        self._busy[place] = job, self._actors[place].run.remote(job)

    def wait(self, emit: Callable[[Event], None], seconds: float) -> None:
        if not self._busy:
            return
        ended, _ = self._ray.wait([answer for _, answer in self._busy.values()], timeout=seconds)
        for place, (job, answer) in list(self._busy.items()):
            try:
                for step, score in self._ray.get(self._actors[place].reports.remote()):
                    emit(Reported(job.number, step, score))
                if answer not in ended:
                    continue
                event: Event = Finished(job.number, self._ray.get(answer))
            except self._ray.exceptions.RayActorError as error:
                del self._actors[place]
                event = Died(job.number, f"with its Ray actor: {one_line(error, 100)}")
            except self._ray.exceptions.RayTaskError as error:
                raise SearchError(f"the objective cannot be read by Ray's workers: {one_line(error.cause)}") from error
            del self._busy[place]
            emit(event)

    def stop(self, grace: float) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._actors.clear()
        self._busy.clear()
        if self._started:
            self._ray.shutdown()
            self._started = False

    def pids(self) -> dict[int, int]:
        """The process of each trial at work, by the trial's number; each on its own machine."""
        return {job.number: self._ray.get(self._actors[place].pid.remote()) for place, (job, _) in self._busy.items()}


class _Worker:
    def __init__(self, objective: bytes, threads: int):
        import torch

        torch.set_num_threads(threads)
        self._objective = cloudpickle.loads(objective)
        self._reports: list[tuple[int, float]] = []

    def run(self, job: Job) -> Any:
        return run_job(self._objective, job, lambda step, score: self._reports.append((step, score)))

    def reports(self) -> list[tuple[int, float]]:
        """Those since the last call."""
        count = len(self._reports)
        found, self._reports[:count] = self._reports[:count], []
        return found

    def pid(self) -> int:
        return os.getpid()
