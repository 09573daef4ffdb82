"""Successive halving."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np

from metahpo.searchers.base import History, Observation, Proposal
from metahpo.searchers.rungs import FUZZ, MultiFidelity, by_rung, not_promoted, promoted, ranked
from metahpo.searchers.space import Space


class Bracket(NamedTuple):
    """One run of successive halving: how many trials each rung has, and how far each of them is trained in all."""

    sizes: list[int]
    budgets: list[float]


@dataclass(frozen=True)
class SuccessiveHalving(MultiFidelity):
    """Trains many settings a little, the best 1 in ``eta`` of them ``eta`` times as far, and so on, until one is
    trained fully; then begins anew with others (Jamieson and Talwalkar 2016; Li et al. 2018, algorithm 1).

    A rung is over when all its trials have ended; those that failed are not replaced. Workers that would have to wait
    for that begin the next bracket meanwhile. Options: see ``MultiFidelity``.
    """

    def brackets(self) -> list[Bracket]:
        """Those of one round; the next round has the same."""
        return [self._bracket(len(self.budgets) - 1)]

    def suggest(self, history: History, space: Space, rng: np.random.Generator) -> Proposal | None:
        plan, begun = self.brackets(), defaultdict[int, list[Observation]](list)
        for o in history:
            begun[o.notes.get("bracket", -1)].append(o)
        dry = waits = False
        for number in count():
            bracket = plan[number % len(plan)]
            rungs = by_rung(begun[number], len(bracket.sizes))
            if len(rungs[0]) < bracket.sizes[0] and not any(rungs[1:]):
                if not dry:
                    notes = {"bracket": number, "rung": 0}
                    proposal = self.begin(history, space, rng, bracket.budgets[0], notes)
                    if proposal is not None:
                        return proposal
                    dry, waits = True, bool(self.view(history, space).pending)
                if not rungs[0]:
                    return None
                if waits:
                    continue
            if (proposal := _promotion(bracket, rungs)) is not None:
                return proposal
        raise AssertionError

    def _bracket(self, s: int) -> Bracket:
        """The one with s + 1 rungs."""
        budgets = self.budgets
        first = math.ceil(len(budgets) / (s + 1) * self.eta**s - FUZZ)
        return Bracket([math.floor(first * self.eta**-i + FUZZ) for i in range(s + 1)], budgets[-s - 1 :])


def _promotion(bracket: Bracket, rungs: list[list[Observation]]) -> Proposal | None:
    """The next one within a bracket; None if it has to wait for a rung or is over."""
    for rung in range(1, len(rungs)):
        below, above = rungs[rung - 1], rungs[rung]
        if any(o.state == "pending" for o in below):
            return None
        candidates = ranked(below)
        if len(above) < min(bracket.sizes[rung], len(candidates)):
            best = not_promoted(candidates, above)
            return best and promoted(best, bracket.budgets[rung], rung)
    return None
