"""Quasi-random search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.stats.qmc import Sobol

from metahpo.searchers.base import History, Proposal, Searcher
from metahpo.searchers.space import Space

NOTE = "sobol"


@dataclass(frozen=True)
class QuasiRandom(Searcher):
    """The points of a Sobol sequence in turn (Sobol 1967; scrambled as by Matousek 1998), which fill the space more
    evenly than random ones.

    The first trial draws the scrambling's seed, which the later ones find in its notes.
    """

    adaptive: ClassVar[bool] = False

    def suggest(self, history: History, space: Space, rng: np.random.Generator) -> Proposal:
        own = [o.notes[NOTE] for o in history if NOTE in o.notes]
        seed = own[0] if own else int(rng.integers(2**31))
        sequence = Sobol(len(space), scramble=True, rng=seed)
        if own:
            sequence.fast_forward(len(own))
        return Proposal(space.decode(sequence.random()[0]), notes={NOTE: seed})
