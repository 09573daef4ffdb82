"""What the multi-fidelity searchers share: the ladder of budgets, promotion, and what their base may see."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from metahpo.checks import check_number, plain
from metahpo.errors import SearchArgumentError
from metahpo.searchers.base import History, Observation, Proposal, Searcher
from metahpo.searchers.moves import DRAWS, untried
from metahpo.searchers.random import Random
from metahpo.searchers.space import Space, key

# Powers of eta are rarely exact: 81 * 3**-4 may lie just below 1.
FUZZ = 1e-9


@dataclass(frozen=True)
class MultiFidelity(Searcher):
    """Base of the searchers that train many settings a little and the best of them on.

    min_budget, max_budget: the least and the most that a trial is trained, in the units of the objective's fidelity
    (epochs, ...); eta: each rung trains ``eta`` times as far as the one below, and 1 in ``eta`` gets there. base: where
    new settings come from. A trial that goes on is a new trial with the same settings whose ``parent`` is the one on
    the rung below; its notes name the ``rung``.

    Raises SearchError for budgets or an eta that make no ladder, and for a base that has rungs of its own.
    """

    min_budget: float = 1
    max_budget: float = 27
    eta: float = 3
    base: Searcher = Random()

    def __post_init__(self) -> None:
        name = type(self).__name__
        for option in ("min_budget", "max_budget", "eta"):
            value = getattr(self, option)
            check_number(self, option, value, error=SearchArgumentError)
            # As Python's own number, for a study knows its searcher by its text.
            object.__setattr__(self, option, plain(value))
        if self.min_budget <= 0:
            raise SearchArgumentError(f"{name}: min_budget should be above 0, found {self.min_budget}")
        if self.min_budget >= self.max_budget:
            raise SearchArgumentError(
                f"{name}: min_budget should be below max_budget, found {self.min_budget} and {self.max_budget}"
            )
        if self.eta <= 1:
            raise SearchArgumentError(f"{name}: eta should be above 1, found {self.eta}")
        if not isinstance(self.base, Searcher) or isinstance(self.base, MultiFidelity):
            raise SearchArgumentError(
                f"{name}: base should be a searcher without budgets of its own, found {self.base!r}"
            )
        if len(self.budgets) < 2:
            raise SearchArgumentError(
                f"{name}: max_budget should be at least eta times min_budget, or there is one rung alone; "
                f"found {self.max_budget}, {self.eta} and {self.min_budget}"
            )

    def check(self, space: Space) -> None:
        self.base.check(space)

    @property
    def budgets(self) -> list[float]:
        """Of the rungs from the lowest on: max_budget * eta^-k, none below min_budget; whole if both ends are."""
        most = math.floor(math.log(self.max_budget / self.min_budget, self.eta) + FUZZ)
        budgets = [self.max_budget * self.eta**-k for k in range(most, -1, -1)]
        if float(self.min_budget).is_integer() and float(self.max_budget).is_integer():
            return sorted({round(budget) for budget in budgets})
        return budgets

    def begin(
        self, history: History, space: Space, rng: np.random.Generator, budget: float, notes: Mapping[str, Any]
    ) -> Proposal | None:
        """A trial with settings that none had at any budget; None if the base has none, or there are
        none."""
        proposal = self._new(history, space, rng)
        if proposal is None:
            return None
        if proposal.notes:
            notes = {**notes, "base": dict(proposal.notes)}
        return Proposal(proposal.settings, budget, None, notes)

    def _new(self, history: History, space: Space, rng: np.random.Generator) -> Proposal | None:
        """The base's next proposal that no trial had.

        After a repeat the base is asked again, as if the repeat were running: so one that takes
        settings in turn goes on to the next, and a model looks elsewhere. What gives repeats alone is
        replaced by settings at random.
        """
        view = self.view(history, space)
        repeats: list[Observation] = []
        while len(repeats) < DRAWS:
            given = self.base.suggest(History([*view, *repeats], view.known), space, rng)
            if given is None and not repeats:
                return None
            if given is None:
                break
            proposal = given if isinstance(given, Proposal) else Proposal(given)
            if key(proposal.settings) not in history.tried:
                return proposal
            number = len(history) + len(repeats)
            repeats.append(Observation(number, proposal.settings, "pending", notes=proposal.notes))
        settings = untried(history, space, rng)
        return None if settings is None else Proposal(settings)

    def view(self, history: History, space: Space) -> History:
        """What the base sees: trials whose losses can be compared, without budgets, parents and our notes.

        They are those at the largest budget at which enough are complete, or else at the lowest, and
        those that failed or are running below it; of all others it knows the settings alone
        (``History.known``). A base that looks at no losses sees each trial that has no parent.
        """
        if not self.base.adaptive:
            return _bare((o for o in history if o.parent is None), history)
        at = self.comparable(history, space) or self.budgets[0]
        return _bare(
            (
                o
                for o in history
                if self._budget(o) == at
                or (self._budget(o) < at and o.state in ("failed", "pending"))
            ),
            history,
        )

    def comparable(self, history: History, space: Space) -> float | None:
        """The largest budget at which enough trials are complete to fit a model to (Falkner et al. 2018, section 3.2:
        three more than there are settings); None if there is none."""
        counts = Counter(self._budget(o) for o in history.complete)
        return max((budget for budget, count in counts.items() if count >= len(space) + 3), default=None)

    def _budget(self, observation: Observation) -> float:
        return self.max_budget if observation.budget is None else observation.budget


def promoted(observation: Observation, budget: float, rung: int) -> Proposal:
    """The trial that goes on from another one."""
    return Proposal(dict(observation.settings), budget, observation.number, {**observation.notes, "rung": rung})


def by_rung(observations: Sequence[Observation], rungs: int) -> list[list[Observation]]:
    """Those that a searcher with rungs suggested, rung by rung."""
    sorted_out: list[list[Observation]] = [[] for _ in range(rungs)]
    for o in observations:
        rung = o.notes.get("rung")
        if isinstance(rung, int) and rung < rungs:
            sorted_out[rung].append(o)
    return sorted_out


def ranked(rung: Sequence[Observation]) -> list[Observation]:
    """The complete ones, best first; of equals the older one."""
    return sorted((o for o in rung if o.loss is not None), key=lambda o: (o.loss, o.number))


def not_promoted(candidates: Sequence[Observation], above: Sequence[Observation]) -> Observation | None:
    """The first that no trial of the rung above went on from."""
    taken = {o.parent for o in above}
    return next((o for o in candidates if o.number not in taken), None)


def _bare(observations: Iterable[Observation], history: History) -> History:
    bare = [
        replace(o, budget=None, parent=None, notes=o.notes.get("base", {})) for o in observations
    ]
    return History(bare, history.known)
