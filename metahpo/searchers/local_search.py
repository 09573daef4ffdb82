"""Random local search with restarts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from metahpo.searchers.base import History, Observation, Proposal, Searcher
from metahpo.searchers.checks import above, at_least
from metahpo.searchers.moves import DRAWS, beside, changeable, changed, completed, untried
from metahpo.searchers.space import Settings, Space, key

NOTE = "climb"
# After a better trial and after a worse one; about one better in five keeps the step.
WIDER, NARROWER = 1.5, 0.9


@dataclass(frozen=True)
class LocalSearch(Searcher):
    """Moves to a better neighbour until there seems to be none, then begins again elsewhere.

    A climb begins at the best of ``starts`` random settings (later ones: of one). A neighbour has one setting changed:
    a choice to any other option, a number by a normal step of ``step`` times its range, at least to the next value of a
    stepped one. The step grows after each trial that is better than the climb's best, which the climb then goes on
    from, and shrinks after each that is not. After ``patience`` of these in a row, or when all neighbours were tried,
    a new climb begins. Nothing is tried twice; once everything was, the search is over.
    """

    starts: int = 10
    step: float = 0.2
    patience: int = 20

    def __post_init__(self) -> None:
        at_least(self, starts=1, patience=1)
        above(self, step=(0, 1))

    def suggest(self, history: History, space: Space, rng: np.random.Generator) -> Proposal | None:
        climb, members = _last_climb(history)
        starts = self.starts if climb == 0 else 1
        told = [(o, loss) for o, loss in history.told if o.number in members]
        if len(members) < starts or not told:
            return _start(climb, history, space, rng)
        best, width, failures = self._walked(told, starts)
        settings = _neighbour(best, width, history, space, rng) if failures < self.patience else None
        if settings is None:
            return _start(climb + 1, history, space, rng)
        return Proposal(settings, notes={NOTE: climb})

    def _walked(self, told: list[tuple[Observation, float]], starts: int) -> tuple[Settings, float, int]:
        """The climb's best settings, its step, and the failures in a row."""
        (best, lowest), width, failures = told[0], self.step, 0
        for place, (observation, loss) in enumerate(told[1:], 1):
            if loss < lowest:
                best, lowest, failures = observation, loss, 0
                width = min(width * WIDER, self.step)
            elif place >= starts:
                width, failures = width * NARROWER, failures + 1
        return best.settings, width, failures


def _last_climb(history: History) -> tuple[int, set[int]]:
    """The number of the climb at work, and its trials; those that were asked for by hand belong to the one before."""
    climb, members = 0, set[int]()
    for observation in history:
        if observation.notes.get(NOTE, climb) != climb:
            climb, members = observation.notes[NOTE], set()
        members.add(observation.number)
    return climb, members


def _start(climb: int, history: History, space: Space, rng: np.random.Generator) -> Proposal | None:
    settings = untried(history, space, rng)
    return None if settings is None else Proposal(settings, notes={NOTE: climb})


def _neighbour(
    best: Settings, width: float, history: History, space: Space, rng: np.random.Generator
) -> Settings | None:
    """One that was not tried; None if all were."""
    tried, names = history.tried, changeable(space, best)
    if not names:
        return None
    for _ in range(DRAWS):
        settings = changed(space, best, names[rng.integers(len(names))], rng, width)
        if key(settings) not in tried:
            return settings
    left = [settings for settings in _around(best, names, space, rng) if key(settings) not in tried]
    return left[rng.integers(len(left))] if left else None


def _around(best: Settings, names: list[str], space: Space, rng: np.random.Generator) -> Iterator[Settings]:
    for name in names:
        if np.isfinite(space[name].count):
            for value in beside(space, best, name):
                yield completed(space, {**best, name: value}, rng)
