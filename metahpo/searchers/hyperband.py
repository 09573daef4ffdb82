"""Hyperband."""

from __future__ import annotations

from dataclasses import dataclass

from metahpo.searchers.successive_halving import Bracket, SuccessiveHalving


@dataclass(frozen=True)
class Hyperband(SuccessiveHalving):
    """Successive halving in brackets that begin on each rung in turn, from many settings trained a little to few that
    are trained fully at once, all of about the same cost (Li et al. 2018, algorithm 1); then another such round.

    Options: see ``MultiFidelity``; of a bracket's course, ``SuccessiveHalving``.
    """

    def brackets(self) -> list[Bracket]:
        return [self._bracket(s) for s in range(len(self.budgets) - 1, -1, -1)]
