"""BOHB."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from metahpo.errors import SearchError
from metahpo.searchers.base import History, Proposal, Searcher
from metahpo.searchers.hyperband import Hyperband
from metahpo.searchers.random import Random
from metahpo.searchers.space import Space


@dataclass(frozen=True)
class BOHB(Hyperband):
    """Hyperband whose new settings come from a model of those at the largest budget that has enough of them; and at
    random before that, and in ``random_fraction`` of the cases ever after (Falkner et al. 2018).

    base: the model. Options: see ``MultiFidelity``.
    """

    base: Searcher = Random()
    random_fraction: float = 1 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction = self.random_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
            raise SearchError(f"BOHB: random_fraction should be in [0, 1], found {fraction!r}")

    def begin(
        self, history: History, space: Space, rng: np.random.Generator, budget: float, notes: Mapping[str, Any]
    ) -> Proposal | None:
        if self.comparable(history, space) is None or rng.random() < self.random_fraction:
            return Proposal(space.sample(rng), budget, None, notes)
        return super().begin(history, space, rng, budget, notes)
