"""Asynchronous successive halving."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from metahpo.searchers.base import History, Proposal
from metahpo.searchers.rungs import FUZZ, MultiFidelity, by_rung, not_promoted, promoted, ranked
from metahpo.searchers.space import Space


@dataclass(frozen=True)
class ASHA(MultiFidelity):
    """Trains on at once what is among the best 1 in ``eta`` of those that have ended on its rung so far, from the
    highest rung down; when there is none, begins with new settings, so that no worker ever waits (Li et al. 2020,
    algorithm 2). Those that failed count as the worst. Options: see ``MultiFidelity``.
    """

    def suggest(self, history: History, space: Space, rng: np.random.Generator) -> Proposal | None:
        budgets = self.budgets
        rungs = by_rung(history, len(budgets))
        for rung in range(len(budgets) - 1, 0, -1):
            ended = [o for o in rungs[rung - 1] if o.state != "pending"]
            share = int(len(ended) / self.eta + FUZZ)
            best = not_promoted(ranked(ended)[:share], rungs[rung])
            if best is not None:
                return promoted(best, budgets[rung], rung)
        return self.begin(history, space, rng, budgets[0], {"rung": 0})
