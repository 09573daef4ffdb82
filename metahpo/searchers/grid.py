"""Grid search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from metahpo.searchers.base import History, Searcher
from metahpo.searchers.space import Settings, Space


@dataclass(frozen=True)
class Grid(Searcher):
    """All settings of the space in turn; continuous ranges need a step."""

    adaptive: ClassVar[bool] = False

    def check(self, space: Space) -> None:
        next(space.grid())

    def suggest(self, history: History, space: Space, rng: np.random.Generator) -> Settings | None:
        return next(space.grid(len(history)), None)
