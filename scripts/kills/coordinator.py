"""The search that ``prove_kills.py`` kills: FOLDER TRIALS STEPS EXECUTOR."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metahpo.searchers import Float, History, Processes, Ray, Searcher, Space, Study, Trial
from metahpo.training.checkpoint import write_atomically


@dataclass(frozen=True)
class Descent(Searcher):
    """From the best so far a step at random: what it suggests depends on every result it has seen."""

    def suggest(self, history: History, space: Space, rng: np.random.Generator) -> dict:
        if len(history.complete) < 4:
            return space.sample(rng)
        best = min(history.complete, key=lambda o: (o.loss, o.number))
        return space.decode(np.clip(space.encode(best.settings) + 0.1 * rng.standard_normal(len(space)), 0, 1))


@dataclass(frozen=True)
class Training:
    """Minimises (w - x)^2 + y^2 by steps of gradient descent, keeping w after each, and notes all that it does."""

    folder: Path
    steps: int

    def __call__(self, trial: Trial) -> float:
        at_work = self.folder / "at_work" / str(os.getpid())
        at_work.parent.mkdir(exist_ok=True)
        at_work.touch()
        kept = trial.folder / "kept.json"
        state = json.loads(kept.read_text()) if kept.exists() else {"step": 0, "w": 1.0}
        while state["step"] < self.steps:
            time.sleep(0.04)
            state = {"step": state["step"] + 1, "w": state["w"] - 0.1 * (state["w"] - trial["x"])}
            write_atomically(kept, json.dumps(state).encode())
            self.note("steps", trial.number)
            trial.report(state["step"], (state["w"] - 0.3) ** 2)
        self.note("ends", trial.number)
        return (state["w"] - 0.3) ** 2 + trial["y"] ** 2

    def note(self, name: str, number: int) -> None:
        # One short write to a file opened for appending is never torn or lost.
        file = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, f"{number}\n".encode())
        os.close(file)


def main() -> None:
    folder, trials, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    space = Space(x=Float(-1, 1), y=Float(-1, 1))
    executor = Ray(2, threads=1) if sys.argv[4] == "ray" else Processes(2, threads=1)
    with Study(space, Descent(), folder / "study.db", seed=7) as study:
        (folder / "begun").touch()
        # Kills are not the trials' fault here: none is given up.
        study.optimize(Training(folder, steps), trials, executor, max_attempts=1000)


if __name__ == "__main__":
    main()
