"""Random search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from metahpo.searchers.base import History, Searcher
from metahpo.searchers.space import Settings, Space


@dataclass(frozen=True)
class Random(Searcher):
    """Each trial's settings at random, whatever the others gave (Bergstra and Bengio 2012)."""

    adaptive: ClassVar[bool] = False

    def suggest(self, history: History, space: Space, rng: np.random.Generator) -> Settings:
        return space.sample(rng)
