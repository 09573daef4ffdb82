"""A worker process of ``Processes``: takes trials from a socket, runs them, and sends back what happens."""

from __future__ import annotations

import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import cloudpickle


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    content = inbox.get()

    from metahpo.errors import MetaHPOError, SearchError
    from metahpo.searchers.executors.base import Finished, Reported, run_job

    try:
        objective = cloudpickle.loads(content)
    except Exception as error:
        connection.send(
            SearchError(f"the objective cannot be read in another process: {type(error).__name__}: {error}")
        )
        return
    # One that is imported later goes by the environment (OMP_NUM_THREADS).
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(os.environ["METAHPO_THREADS"]))
    while True:
        job = inbox.get()

        def report(step: int, score: float, number: int = job.number) -> None:
            connection.send(Reported(number, step, score))

        try:
            connection.send(Finished(job.number, run_job(objective, job, report)))
        except MetaHPOError as error:
            # Not the objective's: these are its trial's.
            connection.send(error)
        except KeyboardInterrupt:
            return


def _listen(connection: Connection, inbox: SimpleQueue[Any]) -> None:
    """Ends the process and all that it started as soon as the study's is gone, whatever the objective is doing."""
    try:
        inbox.put(connection.recv_bytes())
        while True:
            inbox.put(connection.recv())
    finally:
        # It has a group of its own.
        os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
