"""Differential evolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from metahpo.searchers.base import History, Proposal, Searcher
from metahpo.searchers.checks import above, at_least, fraction, one_of
from metahpo.searchers.moves import completed, reflected, untried
from metahpo.searchers.settings import Choice, Setting
from metahpo.searchers.space import Settings, Space

NOTE = "place"
STRATEGIES = ("rand/1/bin", "best/1/bin")


@dataclass(frozen=True)
class DifferentialEvolution(Searcher):
    """Differential evolution (Storn and Price 1997), one trial at a time instead of by generations.

    Each place of the population holds the best trial that was made for it; the places take turns. A trial made for a
    place takes each setting, with probability ``crossover`` and at least one, from a + ``weight`` (b - c), else from
    the place's own: a is a random member or, by strategy "best/1/bin", the best one; b and c are other members. All
    this is in the unit cube; numbers are reflected at the ends. A choice is a's where b and c have the same option,
    else with probability ``weight`` any option. The first ``population`` trials are random, trials that were tried
    already are drawn again, and once all settings there are were tried, the search is over.
    """

    population: int = 10
    weight: float = 0.5
    crossover: float = 0.7
    strategy: str = "rand/1/bin"

    def __post_init__(self) -> None:
        at_least(self, population=4)
        above(self, weight=(0, 2))
        fraction(self, "crossover")
        one_of(self, strategy=STRATEGIES)

    def suggest(self, history: History, space: Space, rng: np.random.Generator) -> Proposal | None:
        places = {o.number: o.notes.get(NOTE, i % self.population) for i, o in enumerate(history)}
        members: dict[int, tuple[float, Settings]] = {}
        for observation, loss in history.told:
            held = members.get(places[observation.number])
            if held is None or loss <= held[0]:
                members[places[observation.number]] = loss, observation.settings
        place = len(history) % self.population
        if len(history) < self.population or place not in members or len(members) < 4:
            settings = untried(history, space, rng)
        else:
            settings = untried(history, space, rng, lambda: self._trial(place, members, space, rng))
        return None if settings is None else Proposal(settings, notes={NOTE: place})

    def _trial(
        self, place: int, members: dict[int, tuple[float, Settings]], space: Space, rng: np.random.Generator
    ) -> Settings:
        others = [other for other in sorted(members) if other != place]
        drawn = [members[i][1] for i in rng.choice(others, 3, replace=False)]
        if self.strategy == "best/1/bin":
            drawn[0] = members[min(members, key=lambda i: (members[i][0], i))][1]
        own = members[place][1]
        surely = list(own)[rng.integers(len(own))]
        values = dict(own)
        for name, setting in space.settings.items():
            if name == surely or rng.random() < self.crossover:
                having = [settings[name] for settings in drawn if name in settings]
                # Where not all have it, there is no difference; where the first has not, nothing to start from.
                if name in drawn[0]:
                    values[name] = self._moved(setting, *having, rng=rng) if len(having) == 3 else having[0]
        return completed(space, values, rng)

    def _moved(self, setting: Setting, a: Any, b: Any, c: Any, *, rng: np.random.Generator) -> Any:
        if isinstance(setting, Choice):
            new = setting.index(b) != setting.index(c) and rng.random() < self.weight
            return setting.options[rng.integers(len(setting.options))] if new else a
        return setting.at(reflected(setting.unit(a) + self.weight * (setting.unit(b) - setting.unit(c))))
