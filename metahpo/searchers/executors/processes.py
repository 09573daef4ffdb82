"""Trials in processes of this machine, each with its share of the cores."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

import cloudpickle

from metahpo.checks import check_whole
from metahpo.errors import SearchArgumentError, SearchError, one_line
from metahpo.searchers.executors.base import Died, Event, Executor, Finished, Objective
from metahpo.searchers.trial import Job

# What sets the number of threads of the libraries that torch and NumPy compute with.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

# A worker imports for seconds; it should end with the study's process in that time too.
START = """
import os, select, signal, sys, threading

def watch():
    line = select.poll()
    line.register(int(sys.argv[1]), 0)
    line.poll()
    os.killpg(os.getpid(), signal.SIGKILL)

threading.Thread(target=watch, daemon=True).start()
from metahpo.searchers.executors.worker import main
main()
"""
# Libraries that are asked for many more end the process.
MOST_THREADS = 1024


def shares(workers: int, threads: int | None) -> tuple[int, int]:
    """The number of workers and of each one's threads, by default its share of the cores."""
    workers = check_whole("executor", "workers", workers, at_least=1, error=SearchArgumentError)
    if threads is not None:
        threads = check_whole(
            "executor", "threads", threads, at_least=1, at_most=MOST_THREADS, error=SearchArgumentError
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return workers, threads or max(1, cores // workers)


def packed(objective: Objective) -> bytes:
    """The objective, to be sent to another process."""
    try:
        return cloudpickle.dumps(objective)
    except Exception as error:
        raise SearchError(f"the objective cannot be sent to other processes: {one_line(error)}") from error


class Processes(Executor):
    """``workers`` processes, each with ``threads`` threads (default: its share of the cores).

    The objective is sent by cloudpickle: functions of a notebook or a script will do, without a main guard. What it
    prints goes to workers/N.log in the study's folder. A worker that dies is replaced; when the study's own process
    dies, however that happens, its workers and what they started end at once.
    """

    def __init__(self, workers: int, threads: int | None = None):
        self.workers, self.threads = shares(workers, threads)
        self._workers: dict[int, _Worker] = {}

    def start(self, objective: Objective, folder: Path | None) -> None:
        self._objective = packed(objective)
        self._folder = folder and folder / "workers"

    def submit(self, job: Job) -> None:
        place = next(i for i in range(self.workers) if i not in self._workers or self._workers[i].job is None)
        if place in self._workers and self._workers[place].process.poll() is not None:
            # It died between two trials.
            self._workers.pop(place).end()
        if place not in self._workers:
            self._workers[place] = _Worker(
                self._objective, self.threads, self._folder and self._folder / f"{place}.log"
            )
        self._workers[place].send(job)

    def wait(self, emit: Callable[[Event], None], seconds: float) -> None:
        wait([worker.connection for worker in self._workers.values() if worker.job], seconds)
        for place, worker in list(self._workers.items()):
            if worker.job is None:
                continue
            # A child of a dead worker's may still hold the other end of the line. In this order, for it may have
            # sent its last just before.
            dead = worker.process.poll() is not None
            try:
                if not worker.connection.poll():
                    if not dead:
                        continue
                    raise EOFError
                event = worker.connection.recv()
            except (EOFError, OSError):
                del self._workers[place]
                emit(Died(worker.job.number, worker.end()))
                continue
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Finished):
                worker.job = None
            emit(event)

    def stop(self, grace: float) -> None:
        deadline = time.monotonic() + grace
        for worker in self._workers.values():
            worker.process.send_signal(signal.SIGTERM if worker.job else signal.SIGKILL)
        for worker in self._workers.values():
            worker.end(max(0.0, deadline - time.monotonic()))
        self._workers.clear()

    def pids(self) -> dict[int, int]:
        """The process of each trial at work, by the trial's number."""
        return {worker.job.number: worker.process.pid for worker in self._workers.values() if worker.job}


class _Worker:
    """One process, and this end of the line to it."""

    def __init__(self, objective: bytes, threads: int, log: Path | None):
        ours, theirs = socket.socketpair()
        environment = {**os.environ, **dict.fromkeys(THREADS, str(threads)), "METAHPO_THREADS": str(threads)}
        # What the objective's own module was imported from.
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
        with theirs, open(log, "ab") if log else open(os.devnull, "wb") as out:
            command = [sys.executable, "-c", START, str(theirs.fileno())]
            # In a session of its own, where Ctrl-C does not reach it: the study decides what becomes of its trial.
            self.process = subprocess.Popen(
                command,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.connection = Connection(ours.detach())
        self.job: Job | None = None
        self._objective: bytes | None = objective

    def send(self, job: Job) -> None:
        self.job = job
        try:
            if self._objective is not None:
                self.connection.send_bytes(self._objective)
                self._objective = None
            self.connection.send(job)
        except OSError:
            pass  # It is dead, which ``wait`` finds out.

    def end(self, grace: float = 5.0) -> str:
        """Ends it and all that it started, after ``grace`` seconds if it has not ended by itself; says how it did."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()
        code = self.process.returncode
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
