"""A searcher that is checked, and how it is run."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from metahpo.errors import SearchError
from metahpo.searchers.base import Searcher
from metahpo.searchers.records import TrialRecord
from metahpo.searchers.space import Space, key
from metahpo.testing.problems import CONTINUOUS, MIXED, ONE, STEPPED, TINY, Objective, bowl
from metahpo.testing.running import run


@dataclass(frozen=True)
class Subject:
    """A searcher, and what it is to be held to: see ``check_searcher``."""

    searcher: Searcher
    trials: int = 24
    deterministic: bool = False
    max_budget: float | None = None

    def fresh(self) -> Searcher:
        """One that has not suggested anything yet."""
        return copy.deepcopy(self.searcher)

    def takes(self, space: Space) -> bool:
        """Whether the searcher's own ``check`` lets it search the space."""
        try:
            self.fresh().check(space)
        except SearchError:
            return False
        return True

    @cached_property
    def space(self) -> Space:
        """The hardest of the spaces that it takes."""
        for space in (MIXED, STEPPED, CONTINUOUS, ONE, TINY):
            if self.takes(space):
                return space
        raise AssertionError("its check() refuses every space, also one with a single Float, and one with few settings")

    @cached_property
    def reference(self) -> list[TrialRecord]:
        return self.run(self.space, bowl(self.space))

    def run(self, space: Space, objective: Objective, trials: int | None = None, **options: Any) -> list[TrialRecord]:
        """A search by a fresh searcher; that it goes on to its end is checked."""
        searcher, trials = self.fresh(), trials or self.trials
        records = run(searcher, space, objective, trials, **options)
        assert len(records) == trials or all_tried(space, records), (
            f"after {len(records)} trials it suggested None with none at work, which ends the search, although there "
            f"are settings of {space} that it has not tried"
        )
        return records


def all_tried(space: Space, records: list[TrialRecord]) -> bool:
    """Whether the records have all settings that there are."""
    if any(math.isinf(setting.count) for setting in space.settings.values()):
        return False
    tried = {key(record.settings) for record in records}
    return all(key(settings) in tried for settings in space.grid())
