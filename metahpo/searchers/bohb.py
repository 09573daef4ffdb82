"""BOHB."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from metahpo.searchers.base import History, Proposal, Searcher
from metahpo.searchers.checks import fraction
from metahpo.searchers.hyperband import Hyperband
from metahpo.searchers.moves import untried
from metahpo.searchers.space import Space
from metahpo.searchers.tpe import TPE


@dataclass(frozen=True)
class BOHB(Hyperband):
    """Hyperband whose new settings come from a model of those at the largest budget that has enough of them; and at
    random before that, and in ``random_fraction`` of the cases ever after (Falkner et al. 2018).

    base: the model. Other options: see ``MultiFidelity``.
    """

    base: Searcher = TPE(initial=0, candidates=64)
    random_fraction: float = 1 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction(self, "random_fraction")

    def begin(
        self, history: History, space: Space, rng: np.random.Generator, budget: float, notes: Mapping[str, Any]
    ) -> Proposal | None:
        if self.comparable(history, space) is None or rng.random() < self.random_fraction:
            settings = untried(history, space, rng)
            return None if settings is None else Proposal(settings, budget, None, notes)
        return super().begin(history, space, rng, budget, notes)
