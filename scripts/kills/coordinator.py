"""The search that ``prove_kills.py`` kills."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kills.training import Training
from metahpo.searchers import Float, History, Processes, Ray, Searcher, Space, Study
from metahpo.searchers.executors import Executor, Serial

SPACE = Space(x=Float(-1, 1), y=Float(-1, 1))


@dataclass(frozen=True)
class Descent(Searcher):
    """From the best so far a step at random: what it suggests depends on every result it has seen."""

    def suggest(self, history: History, space: Space, rng: np.random.Generator) -> dict:
        if len(history.complete) < 4:
            return space.sample(rng)
        best = min(history.complete, key=lambda o: (o.loss, o.number))
        return space.decode(np.clip(space.encode(best.settings) + 0.1 * rng.standard_normal(len(space)), 0, 1))


def search(folder: Path, trials: int, steps: int, executor: str) -> None:
    """The search with two workers, begun or gone on with; executor "serial": the same with one trial at a time,
    which nobody kills."""
    workers: Executor = Serial()
    if executor != "serial":
        workers = Ray(2, threads=1, address="auto") if executor == "ray" else Processes(2, threads=1)
    with Study(SPACE, Descent(), folder / "study.db", seed=7, parallel=2) as study:
        (folder / "begun").touch()
        # Kills are not the trials' fault here: none is given up.
        study.optimize(
            Training(folder, steps, 0.0 if executor == "serial" else 0.04), trials, workers, max_attempts=1000
        )
