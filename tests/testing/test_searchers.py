"""A searcher that is wrong in one way, for each check, and what the check then says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest

from metahpo.errors import SearchError
from metahpo.searchers import Proposal, Random, Searcher
from metahpo.testing import CHECKS, check_searcher
from metahpo.testing.checks import stays_in_the_space
from metahpo.testing.subject import Subject


class NoDataclass(Searcher):
    def __init__(self, width=0.1):
        self.width = width

    def suggest(self, history, space, rng):
        return space.sample(rng)


class Address(NoDataclass):
    __repr__ = object.__repr__


@dataclass(frozen=True)
class FunctionOption(Random):
    draw: Callable = math.sin


@dataclass(frozen=True)
class OutOfBounds(Random):
    def suggest(self, history, space, rng):
        return {name: value * 1e3 if name == "rate" else value for name, value in space.sample(rng).items()}


@dataclass(frozen=True)
class NumpyValues(Random):
    def suggest(self, history, space, rng):
        return {name: np.float64(v) if type(v) is float else v for name, v in space.sample(rng).items()}


@dataclass(frozen=True)
class OffTheSteps(Random):
    def suggest(self, history, space, rng):
        return {name: value + 0.01 if name == "share" else value for name, value in space.sample(rng).items()}


@dataclass(frozen=True)
class EndsEarly(Random):
    def suggest(self, history, space, rng):
        return space.sample(rng) if len(history) < 5 else None


@dataclass(frozen=True)
class Unconditional(Random):
    def suggest(self, history, space, rng):
        return {name: setting.at(rng.random()) for name, setting in space.settings.items()}


@dataclass(frozen=True)
class GlobalRandomness(Random):
    def suggest(self, history, space, rng):
        return space.decode(np.random.random(len(space)))


@dataclass(frozen=True)
class OwnSeed(Random):
    def suggest(self, history, space, rng):
        return space.sample(np.random.default_rng(len(history)))


@dataclass
class Counts(Searcher):
    def __post_init__(self):
        self.calls = itertools.count()

    def suggest(self, history, space, rng):
        return space.sample(np.random.default_rng([next(self.calls), *rng.integers(99, size=2)]))


class Faulty(NoDataclass):
    def __init__(self):
        self.calls = itertools.count()

    def suggest(self, history, space, rng):
        return Counts.suggest(self, history, space, rng)


@dataclass(frozen=True)
class Writes(Random):
    def suggest(self, history, space, rng):
        for observation in history:
            observation.settings.clear()
        return space.sample(rng)


@dataclass(frozen=True)
class NeedsLosses(Random):
    adaptive = True

    def suggest(self, history, space, rng):
        best = min((o for o in history if o.state != "pending"), key=lambda o: o.loss, default=None)
        return space.sample(rng) if best is None else best.settings


@dataclass(frozen=True)
class NeedsSuccess(Random):
    adaptive = True

    def suggest(self, history, space, rng):
        return min(history.complete, key=lambda o: o.loss).settings if len(history) > 9 else space.sample(rng)


@dataclass(frozen=True)
class Divides(Random):
    adaptive = True

    def suggest(self, history, space, rng):
        losses = [o.loss for o in history.complete]
        if len(losses) > 2:
            1 / (max(losses) - min(losses))
        return space.sample(rng)


@dataclass(frozen=True)
class Squares(Random):
    adaptive = True

    def suggest(self, history, space, rng):
        return space.sample(rng) if sum(o.loss**2 for o in history.complete) < math.inf else None


@dataclass(frozen=True)
class OneObjective(Random):
    adaptive = True

    def suggest(self, history, space, rng):
        for observation in history.complete:
            (_,) = observation.losses
        return space.sample(rng)


@dataclass(frozen=True)
class BlindToPending(Random):
    adaptive = True

    def suggest(self, history, space, rng):
        return space.sample(np.random.default_rng(len(history.told)))


@dataclass(frozen=True)
class NeedsResults(Random):
    def suggest(self, history, space, rng):
        return min(history.complete, key=lambda o: o.loss).settings if len(history) > 1 else space.sample(rng)


@dataclass(frozen=True)
class NeedsNotes(Random):
    def suggest(self, history, space, rng):
        assert sum(o.notes["mine"] for o in history) == len(history)
        return Proposal(space.sample(rng), notes={"mine": 1})


@dataclass(frozen=True)
class NeedsNew(Random):
    def suggest(self, history, space, rng):
        left = [s for s in space.grid() if all(s != o.settings for o in history)]
        return left[rng.integers(len(left))]


@dataclass(frozen=True)
class StopsShort(Random):
    def suggest(self, history, space, rng):
        return space.sample(rng) if len(space) != 2 or len(history) < 5 else None


@dataclass(frozen=True)
class Rungs(Random):
    """Every other trial goes on from the one before, if that is complete."""

    adaptive = True
    max_budget: float = 9
    low: float = 3

    def suggest(self, history, space, rng):
        if len(history) % 2 == 0 or history[-1].state != "complete":
            return Proposal(space.sample(rng), self.low)
        return Proposal(dict(history[-1].settings), 9, len(history) - 1)


@dataclass(frozen=True)
class TooFar(Rungs):
    def suggest(self, history, space, rng):
        return replace(super().suggest(history, space, rng), budget=10, parent=None)


@dataclass(frozen=True)
class NoBudget(Rungs):
    def suggest(self, history, space, rng):
        return replace(super().suggest(history, space, rng), budget=0, parent=None)


@dataclass(frozen=True)
class OthersSettings(Rungs):
    def suggest(self, history, space, rng):
        return replace(super().suggest(history, space, rng), settings=space.sample(rng))


@dataclass(frozen=True)
class Unborn(Rungs):
    def suggest(self, history, space, rng):
        return replace(super().suggest(history, space, rng), parent=len(history) + 1)


@dataclass(frozen=True)
class GoesBack(Rungs):
    low: float = 9


@dataclass(frozen=True)
class HeedsNoFailure(Rungs):
    def suggest(self, history, space, rng):
        if len(history) % 2 == 0 or history[-1].state == "pending":
            return Proposal(space.sample(rng), self.low)
        return Proposal(dict(history[-1].settings), 9, len(history) - 1)


@dataclass(frozen=True)
class HeedsNoWorker(Rungs):
    def suggest(self, history, space, rng):
        if len(history) % 2 == 0 or history[-1].state == "failed":
            return Proposal(space.sample(rng), self.low)
        return Proposal(dict(history[-1].settings), 9, len(history) - 1)


@dataclass(frozen=True)
class Refuses(Random):
    def check(self, space):
        raise SearchError("no")


WRONG = [
    (NoDataclass(), "has_a_name", "NoDataclass() does not tell width"),
    (Address(), "has_a_name", "is not the same for an equal searcher"),
    (FunctionOption(), "has_a_name", "options() should give plain values"),
    (OutOfBounds(), "stays_in_the_space", "'rate' should be a number in [1e-05, 100.0]"),
    (OffTheSteps(), "stays_in_the_space", "a number of steps of 0.1"),
    (EndsEarly(), "stays_in_the_space", "after 5 trials it suggested None"),
    (Refuses(), "stays_in_the_space", "its check() refuses every space"),
    (Unconditional(), "follows_conditions", "should not be there: it exists when"),
    (GlobalRandomness(), "follows_the_seed", "in another with the same seed"),
    (OwnSeed(), "follows_the_seed", "deterministic=True"),
    (Counts(), "keeps_no_state", "it should follow from the arguments alone"),
    (Writes(), "keeps_no_state", "it changed the history"),
    (Counts(), "resumes", "trial 1 is"),
    (NeedsLosses(), "bears_failures", "TypeError: '<' not supported"),
    (NeedsSuccess(), "bears_failures", "ValueError: min()"),
    (Divides(), "bears_equal_losses", "ZeroDivisionError"),
    (Squares(), "bears_extreme_losses", "OverflowError"),
    (OneObjective(), "takes_several_objectives", "too many values to unpack"),
    (BlindToPending(), "works_in_parallel", "twice at a time"),
    (NeedsResults(), "answers_before_it_is_told", "ValueError: min()"),
    (NeedsNotes(), "answers_before_it_is_told", "KeyError: 'mine'"),
    (NeedsNew(), "ends_well", "ValueError"),
    (StopsShort(), "ends_well", "it ended after 5 trials, when it had not tried all 6 settings"),
    (TooFar(), "keeps_to_budgets", "the budget should be above 0 and at most 9"),
    (NoBudget(), "keeps_to_budgets", "budget should be a number above 0, found 0"),
    (OthersSettings(), "keeps_to_budgets", "its parent is {"),
    (Unborn(), "keeps_to_budgets", "suggested to go on from trial 1, which there is not"),
    (HeedsNoFailure(), "bears_failures", "its parent has failed"),
    (HeedsNoWorker(), "keeps_to_budgets", "its parent is still at work"),
    (GoesBack(), "keeps_to_budgets", "its parent was trained for 9, so this adds nothing"),
]


def test_numpys_values_are_taken_as_plain_ones():
    subject = Subject(NumpyValues(), 6, False, None)
    stays_in_the_space(subject)
    kinds = {type(value) for record in subject.reference for value in record.settings.values()}
    assert float in kinds
    assert not any(issubclass(kind, np.generic) for kind in kinds)


@pytest.mark.parametrize("searcher, name, says", WRONG, ids=[f"{type(s).__name__}-{name}" for s, name, _ in WRONG])
def test_each_fault_is_found_by_its_check(searcher, name, says):
    check = next(check for check in CHECKS if check.__name__ == name)
    with pytest.raises(AssertionError) as raised:
        check_searcher(searcher, checks=[check])
    assert f"- {name}: " in str(raised.value) and says in str(raised.value)


def test_each_check_has_a_searcher_that_fails_it():
    assert {check.__name__ for check in CHECKS} == {name for _, name, _ in WRONG}


def test_right_ones_pass():
    check_searcher(Rungs())
    check_searcher(Random())


def test_all_faults_are_told_at_once_and_the_searcher_stays_as_it_was():
    searcher = Faulty()
    with pytest.raises(AssertionError) as raised:
        check_searcher(searcher)
    lines = str(raised.value).splitlines()
    assert lines[0] == "Faulty() does not conform:"
    assert [line.split(":")[0] for line in lines[1:]] == ["- has_a_name", "- keeps_no_state", "- resumes"]
    assert next(searcher.calls) == 0


def test_an_error_inside_the_searcher_is_placed():
    with pytest.raises(AssertionError, match=r"test_searchers.py, line \d+, in suggest\)") as raised:
        check_searcher(Divides())
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_class_in_place_of_a_searcher_is_refused():
    with pytest.raises(SearchError, match=r"expected a searcher, such as Random\(\), found <class"):
        check_searcher(Random)
