"""Trials on the machines of a Ray cluster."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cloudpickle

from metahpo.checks import check_number, check_type
from metahpo.errors import MetaHPOError, SearchArgumentError, SearchError, one_line
from metahpo.searchers.executors.base import Died, Event, Executor, Finished, Objective, Reported, run_job
from metahpo.searchers.executors.processes import THREADS, packed, shares
from metahpo.searchers.trial import Job

# How long Ray waits for its own processes: on a machine with much else to do it would take slow ones for dead ones.
PATIENCE = {
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_health_check_timeout_ms": "60000",
}


@dataclass
class _Place:
    """An actor, its trial with the answer to come, and the reports to come."""

    actor: Any
    reports: Any
    job: Job | None = None
    answer: Any = None


class Ray(Executor):
    """``workers`` Ray actors of ``threads`` CPUs (and ``gpus`` GPUs, a fraction too) each.

    address: that of a running cluster, or "auto" for the one this machine belongs to; None starts one that this machine
    alone can reach, without dashboard or usage statistics, and that ends with the search. Every machine needs metahpo,
    the objective's modules, and the study's folder at the same path (a shared file system), where checkpoints and
    results are kept. What the objective prints goes to Ray's logs. An actor that dies is replaced.

    Actors are killed when the search is stopped, without time to save: their trials go on from their last checkpoint.
    """

    def __init__(self, workers: int, threads: int | None = None, gpus: float = 0, address: str | None = None):
        self.workers, self.threads = shares(workers, threads)
        self.gpus = check_number(self, "gpus", gpus, at_least=0, error=SearchArgumentError)
        if address is not None:
            check_type(self, "address", address, str, "text, such as HOST:PORT or auto", error=SearchArgumentError)
        self.address = address
        self._places: list[_Place] = []
        self._started = False

    def start(self, objective: Objective, folder: Path | None) -> None:
        try:
            import ray
        except ImportError:
            raise SearchError('executor ray: Ray is not installed; pip install "metahpo[ray]"') from None
        self._ray, content = ray, packed(objective)
        if not ray.is_initialized():
            self._connect()
            self._started = True
        try:
            self._check_resources()
            self._objective = ray.put(content)
        except BaseException:
            self.stop(0.0)
            raise

    def _connect(self) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.address is not None:
            where = f"no cluster at {self.address!r}"
            alone: AbstractContextManager[None] = nullcontext()
            options["address"] = self.address
        else:
            where, alone = "cannot start a cluster", _on_loopback(self._ray)
            # "local": RAY_ADDRESS may name another one.
            options |= {"address": "local", "num_cpus": self.workers * self.threads, "include_dashboard": False}
        try:
            _reach(self.address)
            with alone:
                self._ray.init(**options)
        except Exception as error:
            token = "; it wants a token: set RAY_AUTH_MODE=token" if "InvalidAuthToken" in str(error.__cause__) else ""
            raise SearchError(f"executor ray: {where}: {one_line(error)}{token}") from error

    def _check_resources(self) -> None:
        # An actor that finds no room would be waited for without an end.
        there = self._ray.cluster_resources()
        for name, each in (("CPU", self.threads), ("GPU", self.gpus)):
            if there.get(name, 0) < each * self.workers:
                raise SearchError(
                    f"executor ray: {self.workers} workers of {each:g} {name} each need {each * self.workers:g}, "
                    f"the cluster has {there.get(name, 0):g}"
                )

    def submit(self, job: Job) -> None:
        place = next((p for p in self._places if p.job is None), None)
        if place is None:
            # A second thread answers ``reports`` while the first is in a trial.
            kind = self._ray.remote(num_cpus=self.threads, num_gpus=self.gpus, max_concurrency=2)(_Worker)
            path = [entry or os.getcwd() for entry in sys.path]
            actor = kind.remote(self._objective, self.threads, path)
            place = _Place(actor, actor.reports.remote())
            self._places.append(place)
        place.job, place.answer = job, place.actor.run.remote(job)

    def wait(self, emit: Callable[[Event], None], seconds: float) -> None:
        busy = [place for place in self._places if place.job is not None]
        if not busy:
            return
        ended, _ = self._ray.wait([place.answer for place in busy], timeout=seconds)
        for place in busy:
            assert place.job is not None
            number = place.job.number
            try:
                self._hand_on_reports(place, number, emit)
                if place.answer not in ended:
                    continue
                event: Event = Finished(number, self._ray.get(place.answer))
                place.job = place.answer = None
            except self._ray.exceptions.RayTaskError as error:
                # Not the objective's own: these are its trial's.
                if isinstance(error.cause, MetaHPOError):
                    raise type(error.cause)(str(error.cause)) from None
                raise SearchError(f"executor ray: a worker failed: {one_line(error.cause)}") from error
            except self._ray.exceptions.RayError as error:
                self._places.remove(place)
                event = Died(number, f"with its Ray actor: {one_line(error, 100)}")
            emit(event)

    def _hand_on_reports(self, place: _Place, number: int, emit: Callable[[Event], None]) -> None:
        # Looked for, never waited for: the actor may still be starting.
        if not self._ray.wait([place.reports], timeout=0)[0]:
            return
        for reported in self._ray.get(place.reports):
            if reported.number == number:
                emit(reported)
        place.reports = place.actor.reports.remote()

    def stop(self, grace: float) -> None:
        for place in self._places:
            self._ray.kill(place.actor)
        self._places.clear()
        if self._started:
            self._ray.shutdown()
            self._started = False

    def pids(self) -> dict[int, int]:
        """The process of each trial at work, by the trial's number; each on its own machine."""
        return {p.job.number: self._ray.get(p.actor.pid.remote()) for p in self._places if p.job is not None}


def _reach(address: str | None) -> None:
    """Raises OSError if nothing listens at HOST:PORT, where Ray would try for a quarter of an hour."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


@contextmanager
def _on_loopback(ray: Any) -> Iterator[None]:
    """What starts inside listens on the loopback interface alone, and sends nobody statistics.

    Ray has no other switch for it, and its processes and this one must agree.
    """
    constants = ray._private.ray_constants
    before, name = constants.ENABLE_RAY_CLUSTER, constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    # Who has set these has a reason.
    with patch.dict(os.environ, {"RAY_USAGE_STATS_ENABLED": "0", **PATIENCE, **os.environ, name: "0"}):
        constants.ENABLE_RAY_CLUSTER = False
        try:
            yield
        finally:
            constants.ENABLE_RAY_CLUSTER = before


class _Worker:
    def __init__(self, content: bytes, threads: int, path: list[str]):
        os.environ.update(dict.fromkeys(THREADS, str(threads)))
        import torch

        torch.set_num_threads(threads)
        # From where the objective's own modules were imported.
        sys.path += [entry for entry in path if entry not in sys.path]
        self._content, self._objective = content, None
        self._reports: list[Reported] = []

    def run(self, job: Job) -> Any:
        try:
            self._objective = self._objective or cloudpickle.loads(self._content)
        except Exception as error:
            raise SearchError(
                f"the objective cannot be read in another process: {type(error).__name__}: {error}"
            ) from error
        return run_job(
            self._objective, job, lambda step, score: self._reports.append(Reported(job.number, step, score))
        )

    def reports(self) -> list[Reported]:
        """Those since the last call."""
        count = len(self._reports)
        found, self._reports[:count] = self._reports[:count], []
        return found

    def pid(self) -> int:
        return os.getpid()
