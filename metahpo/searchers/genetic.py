"""Genetic search."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from metahpo.searchers.base import History, Searcher
from metahpo.searchers.checks import above, at_least, fraction
from metahpo.searchers.moves import changeable, changed, completed, untried
from metahpo.searchers.space import Settings, Space


@dataclass(frozen=True)
class Genetic(Searcher):
    """Children of the best trials so far, one at a time (a steady-state genetic algorithm: Whitley 1989, with uniform
    crossover: Syswerda 1989).

    The population is the ``population`` best trials, so that each good child pushes out the worst member. Each parent
    is the best of ``tournament`` members drawn at random. With probability ``crossover`` a child has each setting from
    either of two parents, else all from one; then each setting mutates with a probability of 1 in their number: a
    number by a normal step of ``width`` times its range, a choice to any other option. A child that was tried already
    mutates again. The first ``initial`` trials are random. Once all settings there are were tried, the search is over.
    """

    population: int = 20
    tournament: int = 3
    crossover: float = 0.7
    width: float = 0.2
    initial: int = 10

    def __post_init__(self) -> None:
        at_least(self, population=2, tournament=1, initial=1)
        above(self, width=(0, 1))
        fraction(self, "crossover")

    def suggest(self, history: History, space: Space, rng: np.random.Generator) -> Settings | None:
        ranked = sorted(history.told, key=lambda pair: (pair[1], pair[0].number))
        members = [o.settings for o, _ in ranked[: self.population]]
        if len(history) < self.initial or not members:
            return untried(history, space, rng)
        return untried(history, space, rng, lambda: self._child(members, space, rng))

    def _child(self, members: list[Settings], space: Space, rng: np.random.Generator) -> Settings:
        # They are in order, best first: the winner is the first of those drawn.
        mother, father = (members[min(rng.integers(len(members), size=self.tournament))] for _ in range(2))
        child = dict(mother)
        if rng.random() < self.crossover:
            names = [name for name in space if name in mother or name in father]
            parents = [[p for p in (mother, father) if name in p] for name in names]
            child = {name: of[rng.integers(len(of))][name] for name, of in zip(names, parents)}
            child = completed(space, child, rng)
        names = changeable(space, child)
        for name in [name for name in names if rng.random() < 1 / len(names)]:
            # Another mutation may have taken it away.
            if name in child:
                child = changed(space, child, name, rng, self.width)
        return child
