"""The trials of the search that ``prove_kills.py`` kills, and the log of what they do.

Apart from the search, whose libraries take a worker seconds to import.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from metahpo.runs.files import write_atomically

if TYPE_CHECKING:
    from metahpo.searchers import Trial


@dataclass(frozen=True)
class Training:
    """Minimises (w - x)^2 + y^2 by steps of gradient descent, keeping w after each, and logs all that it does.

    pause: seconds that a step takes, in which it may be killed.
    """

    folder: Path
    steps: int
    pause: float

    def __call__(self, trial: Trial) -> float:
        self.log("again" if self.has_ended(trial.number) else "begin", trial)
        kept = trial.folder / "kept.json"
        path = json.loads(kept.read_text()) if kept.exists() else [1.0]
        # The last ones before a death may not have been heard.
        for step, w in enumerate(path):
            trial.report(step, (w - 0.3) ** 2)
        while len(path) <= self.steps:
            self.log("step", trial)
            time.sleep(self.pause)
            path.append(path[-1] - 0.1 * (path[-1] - trial["x"]))
            write_atomically(kept, json.dumps(path).encode())
            trial.report(len(path) - 1, (path[-1] - 0.3) ** 2)
        self.log("end", trial)
        return (path[-1] - 0.3) ** 2 + trial["y"] ** 2

    def has_ended(self, number: int) -> bool:
        """Whether the trial's result is there already, in its file or in the study."""
        if (self.folder / "study.files" / "results" / f"{number:05d}.json").exists():
            return True
        with closing(sqlite3.connect(self.folder / "study.db", timeout=60)) as database:
            found = database.execute("SELECT state FROM trials WHERE number = ?", (number,)).fetchall()
        return found != [("RUNNING",)]

    def log(self, what: str, trial: Trial) -> None:
        # One short write to a file opened for appending is never torn or lost.
        file = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, f"{what} {trial.number} {os.getpid()} {born(os.getpid())}\n".encode())
        os.close(file)


def born(pid: int) -> str | None:
    """When a process began, by which a later one of the same number is told apart; None if there is none at work."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else rest[18]
