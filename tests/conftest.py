from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from sqlite3 import dbapi2
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# Importing them takes a process seconds; the copies of one that has done it start at once.
LOADED = ["pytest", "torch._dynamo", "matplotlib.pyplot"]
LOADED += ["metahpo.cli", "metahpo.building", "metahpo.report", "metahpo.searchers.registry"]
LOADED += ["metahpo.searchers.study", "metahpo.searchers.training_objective"]

CHILD = """
import os, sys
os.chdir(job["cwd"])
os.environ.update(job["env"])
for number, name in ((1, "out"), (2, "err")):
    os.dup2(os.open(job[name], os.O_WRONLY), number)
sys.path[:0] = [job["cwd"], job["root"]]
exec(compile(job["program"], "program", "exec"), {"__name__": "__main__"})
"""


@pytest.fixture(autouse=True)
def _seeded():
    """A failure can be repeated."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk():
    """What is written need not survive a fall of power; to sync each file is a good part of a small run's time."""
    connect = dbapi2.connect

    def unsynced(*arguments: Any, **options: Any) -> dbapi2.Connection:
        connection = connect(*arguments, **options)
        # What is wrong with a file is for the one who reads it to find.
        with suppress(dbapi2.Error):
            connection.execute("PRAGMA synchronous = OFF")
        return connection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(dbapi2, "connect", unsynced)
        yield


@pytest.fixture(autouse=True, scope="module")
def _short_collections():
    """Python's garbage collection looks no more through what was there before the module, which is torch for most."""
    gc.collect()
    gc.freeze()


@dataclass
class Child:
    """A process at work, and the files that take what it prints."""

    process: BaseProcess
    out: Path
    err: Path

    def wait_for(self, text: str) -> None:
        """Returns once the process has printed ``text``, or has ended."""
        while text not in self.out.read_text() and self.process.is_alive():
            time.sleep(0.002)

    def send_signal(self, signum: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signum)

    def finished(self, timeout: float = 200) -> tuple[int | None, str, str]:
        """(exit code, stdout, stderr) once it has ended; the code is None if it has not after ``timeout`` seconds."""
        self.process.join(timeout)
        return self.process.exitcode, self.out.read_text(), self.err.read_text()


@pytest.fixture
def start(tmp_path_factory) -> Iterator[Callable[..., Child]]:
    """Starts a program, given as text, in a process of its own; in the working directory of the moment.

    The process is a fork of one that has imported torch and metahpo and run nothing: all as in a new interpreter, only
    that what metahpo reads from the environment at import, and torch at its start (threads), is what it is here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    children: list[Child] = []

    def start(program: str, **env: str) -> Child:
        folder = tmp_path_factory.mktemp("process")
        out, err = folder / "out", folder / "err"
        for path in (out, err):
            path.touch()
        job = {"cwd": os.getcwd(), "root": str(ROOT), "env": env, "out": out, "err": err, "program": program}
        process = context.Process(target=exec, args=(CHILD, {"job": job}))
        process.start()
        children.append(Child(process, out, err))
        return children[-1]

    yield start
    for child in children:
        child.process.kill()
        child.process.join()
        child.process.close()


@pytest.fixture
def script(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs a program of scripts/ by name, with arguments; gives its exit code and what it printed."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            module = importlib.import_module(name)
            # A measurement of memory collects garbage first, which takes long among all that has been imported.
            gc.freeze()
            code = module.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run
