"""Regularised (ageing) evolution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from metahpo.searchers.base import History, Searcher
from metahpo.searchers.checks import above, at_least
from metahpo.searchers.moves import changeable, changed, untried
from metahpo.searchers.space import Settings, Space


@dataclass(frozen=True)
class RegularizedEvolution(Searcher):
    """The population is the latest ``population`` trials, whatever their losses; the best of ``sample`` of them drawn
    at random has a child with one setting changed (Real et al. 2019, algorithm 1).

    A number moves by a normal step of ``width`` times its range, a choice to any other option. A child that was tried
    already is drawn again; once all settings there are were tried, the search is over. The first ``population`` trials
    are random.
    """

    population: int = 20
    sample: int = 5
    width: float = 0.2

    def __post_init__(self) -> None:
        at_least(self, population=2, sample=1)
        above(self, width=(0, 1))

    def suggest(self, history: History, space: Space, rng: np.random.Generator) -> Settings | None:
        members = history.told[-self.population :]
        if len(history) < self.population or not members:
            return untried(history, space, rng)

        def child() -> Settings:
            drawn = [members[i] for i in rng.integers(len(members), size=self.sample)]
            parent = min(drawn, key=lambda pair: pair[1])[0].settings
            names = changeable(space, parent)
            return changed(space, parent, names[rng.integers(len(names))], rng, self.width) if names else parent

        return untried(history, space, rng, child)
