"""Proof that a search survives the death of its processes.

A search with two workers is killed at random moments with SIGKILL, by turns a worker and the coordinator, which is then
started again. In the end every trial has run to its end once, the study has been readable after each kill, and all
trials, their scores and the best are those of the same search without kills.

    python scripts/prove_kills.py --json figures.json                  # 20 kills
    python scripts/prove_kills.py --executor ray --kills 1             # a worker of a Ray cluster on this machine
    python scripts/prove_kills.py --quick
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from metahpo.searchers import Study
from metahpo.training.environment import versions

PROGRAM = Path(__file__).parent / "kills" / "coordinator.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--steps", type=int, default=20, help="of each trial, of about 40 ms, each kept")
    parser.add_argument("--executor", choices=["processes", "ray"], default="processes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="4 kills")
    options = parser.parse_args()
    if options.quick:
        options.kills, options.trials, options.steps = 4, 10, 10
    with tempfile.TemporaryDirectory(prefix="metahpo-kills-") as folder:
        rows = [search(Path(folder) / "calm", options, 0), search(Path(folder) / "killed", options, options.kills)]
    calm, killed = rows
    for row in rows:
        row["trials_hash"] = hash_of(row.pop("trials"))
    promises = {
        "every trial ended once": killed["ends"] == [1] * options.trials,
        "readable after each kill": killed["unreadable"] == 0,
        "the same trials and scores": killed["trials_hash"] == calm["trials_hash"],
        "the same best": killed["best"] == calm["best"],
        "as many kills as asked": killed["kills"] == options.kills,
    }
    for name, kept in promises.items():
        print(f"{'ok  ' if kept else 'FAIL'} {name}")
    if options.json:
        import torch

        machine = versions(torch.device("cpu"))
        options.json.write_text(json.dumps({"machine": machine, "rows": rows, "promises": promises}, indent=2))
    return 0 if all(promises.values()) else 1


def search(folder: Path, options: argparse.Namespace, kills: int) -> dict:
    """One search, with ``kills`` kills; what it came to."""
    folder.mkdir()
    moments, killed, unreadable, steps_lost = random.Random(options.seed), {"worker": 0, "coordinator": 0}, 0, 0
    started, process = time.perf_counter(), None
    while True:
        process = process or start(folder, options)
        left = kills - sum(killed.values())
        # Long enough for a coordinator to begin, short enough to meet it at all it does.
        pause = moments.uniform(0.2, 4.0) if left > 0 else None
        try:
            if process.wait(pause) == 0:
                break
            raise SystemExit(f"the coordinator failed:\n{(folder / 'coordinator.log').read_text()[-2000:]}")
        except subprocess.TimeoutExpired:
            pass
        # With Ray a coordinator takes its cluster with it; its workers alone are tried there.
        what = "worker" if options.executor == "ray" or sum(killed.values()) % 2 == 0 else "coordinator"
        if what == "coordinator":
            if not (folder / "begun").exists():
                continue  # Nothing to lose yet.
            process.kill()
            process.wait()
            (folder / "begun").unlink(missing_ok=True)
            process = None
        else:
            pids = [int(path.name) for path in (folder / "at_work").glob("*") if alive(int(path.name))]
            if not pids:
                continue
            os.kill(moments.choice(sorted(pids)), signal.SIGKILL)
        killed[what] += 1
        unreadable += not readable(folder / "study.db")
        print(f"{folder.name}: {time.perf_counter() - started:5.1f} s  killed the {what}", flush=True)
    ends = (folder / "ends").read_text().split()
    study = Study.open(folder / "study.db")
    trials = [(t.settings, t.state, t.scores) for t in study.trials]
    steps = len((folder / "steps").read_text().split())
    best = study.best
    row = {
        "table": options.executor,
        "kills": sum(killed.values()),
        "killed_workers": killed["worker"],
        "killed_coordinators": killed["coordinator"],
        "unreadable": unreadable,
        "ends": [ends.count(str(n)) for n in range(options.trials)],
        "steps": steps,
        "steps_needed": options.trials * options.steps,
        "deaths_noted": sum(t.deaths for t in study.trials),
        "best": [best.number, best.score] if best else None,
        "seconds": round(time.perf_counter() - started, 1),
        "trials": trials,
    }
    print(f"{folder.name}: " + ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("ends", "trials", "table")))
    study.close()
    return row


def start(folder: Path, options: argparse.Namespace) -> subprocess.Popen:
    command = [sys.executable, str(PROGRAM), str(folder), str(options.trials), str(options.steps), options.executor]
    with open(folder / "coordinator.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def readable(path: Path) -> bool:
    """Whether the file is whole, and every trial of it can be read."""
    if not path.exists():
        return True
    with sqlite3.connect(path, timeout=60) as database:
        whole = database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
    study = Study.open(path)
    study.close()
    return whole


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def hash_of(trials: list) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(trials).encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
