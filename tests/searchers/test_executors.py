from __future__ import annotations

import math
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from metahpo.errors import SearchError
from metahpo.searchers import Choice, Float, Grid, Processes, Random, Space, Study
from metahpo.searchers.executors.processes import shares

SPACE = Space(x=Float(0, 1))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids) -> bool:
    """Whether these processes end, which the kernel may take a moment for."""
    deadline = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(alive, pids))


def test_trials_of_all_kinds_in_two_processes(tmp_path):
    """What an objective may do to its process; each trial by its number, in one search."""
    children = tmp_path / "children"

    def threads(trial):
        import torch

        return torch.get_num_threads() + 10 * int(os.environ["OMP_NUM_THREADS"])

    def prints(trial):
        print("a line for the log" * 10_000, flush=True)
        os.system("echo of a child; echo to both >&2")
        return 1.0

    def reports(trial):
        for step in range(3000):
            trial.report(step, step / 2)
        return 1.0

    def raises(trial):
        raise KeyError(trial.number)

    def exits(trial):
        return exit("enough")

    def goes_on(end):
        """Keeps what it has done in its folder, and ends its process halfway."""

        def objective(trial):
            kept = trial.folder / "kept"
            done = int(kept.read_text()) if kept.exists() else 0
            assert done == 3 * trial.attempt
            for step in range(done, 6):
                if step == 3 and not trial.attempt:
                    end()
                kept.write_text(str(step + 1))
                trial.report(step, float(step))
            return 6.0

        return objective

    def is_killed():
        """As by a kernel out of memory, with children at work."""
        import subprocess

        # One that holds this process's end of the line, and one that does not.
        forked = os.fork()
        if forked == 0:
            time.sleep(600)
        started = subprocess.Popen(["sleep", "600"]).pid
        children.write_text(f"{os.getpid()} {forked} {started}")
        os.kill(os.getpid(), signal.SIGKILL)

    kinds = {
        "threads": threads,
        "prints": prints,
        "reports": reports,
        "raises": raises,
        "exits": exits,
        "is gone": goes_on(lambda: os._exit(3)),
        "is killed": goes_on(is_killed),
        "diverges": lambda trial: math.nan,
    }

    def objective(trial):
        return kinds[trial["kind"]](trial)

    with Study(Space(kind=Choice(*kinds)), Grid(), folder=tmp_path) as study:
        study.optimize(objective, workers=Processes(2, threads=1))
        trials = {trial.settings["kind"]: trial for trial in study.trials}
    assert trials["threads"].score == 11
    assert trials["reports"].reports == {step: step / 2 for step in range(3000)}
    assert "Traceback" in trials["raises"].error
    assert trials["raises"].error.endswith(f"KeyError: {trials['raises'].number}\n")
    assert trials["exits"].error.endswith("SystemExit: enough\n")
    assert trials["diverges"].error == "the score is nan"
    for name in ("is gone", "is killed"):
        assert trials[name].score == 6.0
        assert trials[name].reports == {step: float(step) for step in range(6)}
    assert [name for name in kinds if trials[name].deaths] == ["is gone", "is killed"]
    assert gone(map(int, children.read_text().split()))
    logs = "".join(path.read_text() for path in (tmp_path / "workers").iterdir())
    assert "a line for the log" * 10_000 in logs
    assert "of a child" in logs
    assert "to both" in logs


PROGRAM = """
import os, signal, sys, time
# A shell's background job, and so these tests in one, is started with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from metahpo.searchers import *
from metahpo.training.interrupts import Interrupted, Interrupts

def objective(trial):
    kept = trial.folder / "kept"
    done = int(kept.read_text()) if kept.exists() else 0
    if os.getsid(0) == os.getpid() and os.fork() == 0:
        # A child of a worker, such as a loader of data.
        time.sleep(600)
    with Interrupts() as interrupts:
        print("at work", flush=True)
        (trial.folder / "pid").write_text(str(os.getpid()))
        while True:
            time.sleep(0.01)
            done += 1
            if interrupts.signum is not None:
                # As a training does: it saves itself, then stops.
                kept.write_text(str(done))
                raise Interrupted(interrupts.signum)

workers = {workers}
with Study(Space(x=Float(0, 1)), storage={path!r}) as study:
    try:
        study.optimize(objective, 4, workers)
    except Interrupted as stop:
        print(f"{{stop}}, {{[t.state for t in study.trials]}}", flush=True)
"""


def at_work(folder: Path, search) -> int:
    """The process that a search's first trial is at work in, once it is."""
    pid = folder / "trials" / "00000" / "pid"
    while not (pid.exists() and pid.read_text()):
        assert search.process.is_alive(), search.finished()
        time.sleep(0.01)
    return int(pid.read_text())


@pytest.mark.parametrize(
    "workers, signum",
    [("1", signal.SIGINT), ("1", signal.SIGTERM), ("Processes(1)", signal.SIGINT)],
)
def test_a_search_that_is_stopped_lets_trainings_save_themselves(workers, signum, tmp_path, start):
    path = tmp_path / "study.db"
    search = start(PROGRAM.format(workers=workers, path=str(path)))
    pid = at_work(tmp_path / "study.files", search)
    search.send_signal(signum)
    code, out, err = search.finished(100)
    assert code == 0, out + err
    assert f"stopped by {signum.name}, ['running']" in out
    assert gone([pid])
    saved = int((tmp_path / "study.files/trials/00000/kept").read_text())
    assert saved > 0
    with Study(SPACE, storage=path) as study:
        assert study.optimize(lambda trial: int((trial.folder / "kept").read_text()), 1).score == saved
        assert study.trials[0].deaths == 0


def test_workers_end_with_the_study_however_that_ends(tmp_path, start):
    search = start(PROGRAM.format(workers="Processes(1)", path=str(tmp_path / "study.db")))
    pid = at_work(tmp_path / "study.files", search)
    family = [other for other in map(int, filter(str.isdigit, os.listdir("/proc"))) if group(other) == pid]
    assert len(family) == 2
    search.process.kill()
    assert gone(family)


def group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


class Unreadable:
    """Sent, but not read again."""

    def __call__(self, trial):
        return 1.0

    def __reduce__(self):
        return eval, ("1 / 0",)


def test_an_objective_that_cannot_be_sent_or_read():
    with Study(SPACE) as study:
        with pytest.raises(SearchError, match=r"^the objective cannot be sent to other processes: cannot pickle"):
            lock = threading.Lock()
            study.optimize(lambda trial: lock, 1, Processes(2))
        with pytest.raises(
            SearchError, match=r"^the objective cannot be read in another process: ZeroDivisionError: di"
        ):
            study.optimize(Unreadable(), 1, Processes(1))


def test_a_trial_that_another_process_still_runs_stops_the_search(tmp_path, monkeypatch):
    monkeypatch.setattr("metahpo.searchers.executors.base.ORPHAN_SECONDS", 0.0)
    from metahpo.searchers.lock import FileLock

    with Study(SPACE, Random(), tmp_path / "study.db") as study:
        with (
            FileLock(tmp_path / "study.files/results/00000.lock", "it"),
            pytest.raises(SearchError, match=rf"^trial 0 is in use by process {os.getpid()} on "),
        ):
            study.optimize(lambda trial: 1.0, 1)
        assert study.optimize(lambda trial: 1.0, 1).score == 1.0


def test_shares_of_the_cores():
    cores = len(os.sched_getaffinity(0))
    assert shares(1, None) == (1, cores)
    assert shares(cores, None) == (cores, 1)
    assert shares(10 * cores, None) == (10 * cores, 1)
    assert shares(3, 5) == (3, 5)
