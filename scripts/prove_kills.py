"""Proof that a search survives the death of its processes.

A search with two workers is killed at random moments with SIGKILL, by turns a worker and the coordinator, which is then
started again. In the end no trial is lost; none was begun again once its result was there, or trained twice to its end;
a kill cost each worker that it hit one step at most; the study was readable after each kill; all trials, what they
reported, their scores and the best are those of the same search undisturbed; and no process is left.

    python scripts/prove_kills.py --json figures.json                  # 20 kills
    python scripts/prove_kills.py --executor ray --kills 2             # a Ray cluster on this machine
    python scripts/prove_kills.py --quick
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing, nullcontext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from kills import coordinator, training
from kills.cluster import cluster
from metahpo.searchers import Study
from metahpo.training.environment import versions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--steps", type=int, default=20, help="of each trial, of about 40 ms, each kept")
    parser.add_argument("--executor", choices=["processes", "ray"], default="processes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="2 kills of a short search")
    options = parser.parse_args()
    options.longest_pause = 4.0
    if options.quick:
        options.kills, options.trials, options.steps, options.longest_pause = 2, 6, 8, 0.3
    with tempfile.TemporaryDirectory(prefix="metahpo-kills-") as folder:
        calm, killed = Path(folder) / "calm", Path(folder) / "killed"
        calm.mkdir()
        started = time.perf_counter()
        coordinator.search(calm, options.trials, options.steps, "serial")
        rows = [figures(calm, "undisturbed", options, started)]
        killed.mkdir()
        started = time.perf_counter()
        with cluster() if options.executor == "ray" else nullcontext({}) as environment:
            kills = kill(killed, options, environment)
        rows.append({**kills, **figures(killed, options.executor, options, started)})
    promises = judged(*rows, options)
    for name, kept in promises.items():
        print(f"{'ok  ' if kept else 'FAIL'} {name}")
    if options.json:
        machine = versions(torch.device("cpu"))
        options.json.write_text(json.dumps({"machine": machine, "rows": rows, "promises": promises}, indent=2))
    return 0 if all(promises.values()) else 1


def kill(folder: Path, options: argparse.Namespace, environment: dict[str, str]) -> dict:
    """The search with kills, to its end; how many there were, and after how many the study could not be read."""
    moments, killed, unreadable = random.Random(options.seed), Counter(worker=0, coordinator=0), 0
    started, process = time.perf_counter(), start(folder, options, environment)
    while True:
        left = options.kills - sum(killed.values())
        # From before a search is at work to well into it.
        process.join(moments.uniform(0.02, options.longest_pause) if left > 0 else None)
        if process.exitcode is not None:
            if process.exitcode == 0:
                break
            raise SystemExit(f"the coordinator failed:\n{(folder / 'coordinator.log').read_text()[-2000:]}")
        what = "worker" if sum(killed.values()) % 2 == 0 else "coordinator"
        if what == "worker":
            if not (pids := workers(folder)):
                continue
            os.kill(moments.choice(sorted(pids)), signal.SIGKILL)
        else:
            if not (folder / "begun").exists() or (options.quick and not workers(folder)):
                continue  # There is nothing to lose yet.
            process.kill()
            process.join()
            (folder / "begun").unlink()
            process = start(folder, options, environment)
        killed[what] += 1
        unreadable += not readable(folder / "study.db")
        print(f"{time.perf_counter() - started:5.1f} s  killed the {what}", flush=True)
    return {"killed_workers": killed["worker"], "killed_coordinators": killed["coordinator"], "unreadable": unreadable}


def figures(folder: Path, table: str, options: argparse.Namespace, started: float) -> dict:
    """What a search came to, by its study and by its trials' own log."""
    seconds = round(time.perf_counter() - started, 1)
    lines = [line.split() for line in (folder / "log").read_text().splitlines()]
    counts = {what: Counter(int(n) for w, n, *_ in lines if w == what) for what in ("begin", "again", "step", "end")}
    # An attempt that found all its steps done only hands their result in.
    trained: Counter[int] = Counter()
    at_work: dict[str, bool] = {}
    for what, number, pid, _ in lines:
        trained[int(number)] += what == "end" and at_work.get(pid, False)
        at_work[pid] = what == "step" or (what != "begin" and at_work.get(pid, False))
    with Study.open(folder / "study.db") as study:
        trials = [[t.settings, t.state, t.scores, dict(t.reports)] for t in study.trials]
        best, deaths = study.best, sum(t.deaths for t in study.trials)
    row = {
        "table": table,
        "trials": len(trials),
        "complete": sum(state == "complete" for _, state, *_ in trials),
        "attempts": sum(counts["begin"].values()) + sum(counts["again"].values()),
        "begun_again_after_the_end": sum(counts["again"].values()),
        "most_trained_to_the_end": max(trained.values()),
        "fewest_ends": min(counts["end"][n] for n in range(options.trials)),
        "steps": sum(counts["step"].values()),
        "steps_needed": options.trials * options.steps,
        "deaths_noted": deaths,
        "processes_left": left_over(folder),
        "best": [best.number, best.score] if best else None,
        "trials_hash": hashlib.sha256(json.dumps(trials).encode()).hexdigest()[:16],
        "seconds": seconds,
    }
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def judged(calm: dict, killed: dict, options: argparse.Namespace) -> dict[str, bool]:
    lost = killed["attempts"] - options.trials
    return {
        "as many kills as asked": killed["killed_workers"] + killed["killed_coordinators"] == options.kills,
        "no trial lost": killed["complete"] == options.trials == killed["trials"] and killed["fewest_ends"] >= 1,
        "no trial begun again once its result was there": killed["begun_again_after_the_end"] == 0,
        "no trial trained twice to its end": killed["most_trained_to_the_end"] == 1,
        "one step lost at most of each attempt cut short": killed["steps"] - killed["steps_needed"] <= lost,
        "study readable after each kill": killed["unreadable"] == 0,
        "trials, reports and scores of the undisturbed search": killed["trials_hash"] == calm["trials_hash"],
        "its best": killed["best"] == calm["best"],
        "no process left": killed["processes_left"] == 0,
    }


def start(folder: Path, options: argparse.Namespace, environment: dict[str, str]) -> BaseProcess:
    """A coordinator in a process of its own: a fork of one that has imported all, for that takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["metahpo.searchers.study"])
    process = context.Process(
        target=coordinate, args=(folder, options.trials, options.steps, options.executor, environment)
    )
    process.start()
    return process


def coordinate(folder: Path, trials: int, steps: int, executor: str, environment: dict[str, str]) -> None:
    """What that process does."""
    log = os.open(folder / "coordinator.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    coordinator.search(folder, trials, steps, executor)


def workers(folder: Path) -> set[int]:
    """The processes that have been at work in a trial, and are there still."""
    if not (folder / "log").exists():
        return set()
    lines = [line.split() for line in (folder / "log").read_text().splitlines()]
    return {int(pid) for _, _, pid, born in lines if int(pid) != os.getpid() and training.born(int(pid)) == born}


def left_over(folder: Path) -> int:
    # The kernel may take a moment to end those whose coordinator is gone.
    deadline = time.monotonic() + 10
    while workers(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(workers(folder))


def readable(path: Path) -> bool:
    """Whether the file is whole, and every trial of it can be read."""
    if not path.exists():
        return True
    with closing(sqlite3.connect(path, timeout=60)) as database:
        whole = database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    Study.open(path).close()
    return whole


if __name__ == "__main__":
    sys.exit(main())
