"""New settings of the searchers with rungs: none that any trial had, at any budget."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest

from metahpo.searchers import (
    ASHA,
    BOHB,
    Bayesian,
    Choice,
    Float,
    Hyperband,
    Int,
    Proposal,
    Searcher,
    Space,
    Study,
    SuccessiveHalving,
)
from metahpo.searchers.registry import SEARCHERS
from metahpo.searchers.rungs import MultiFidelity
from metahpo.searchers.space import key

RUNGS = [SuccessiveHalving, Hyperband, ASHA, BOHB]
BASES = [name for name, kind in SEARCHERS.items() if not issubclass(kind, MultiFidelity)]
# Small enough that chance repeats itself within a few brackets.
FINITE = Space(x=Int(1, 9), kind=Choice("a", "b", "c"))
QUICK = {"bayesian": {"initial": 3}, "tpe": {"initial": 3}, "cma_es": {"initial": 2}}


def loss(trial):
    return abs(trial["x"] - 3) + 1 / trial.budget


def searched(searcher, trials, space=FINITE, seed=0, parallel=1):
    study = Study(space, searcher, seed=seed, parallel=parallel)
    study.optimize(loss, trials=trials)
    return study


def begun(study):
    return [key(record.settings) for record in study.trials if record.parent is None]


@dataclass(frozen=True)
class Stubborn(Searcher):
    """Gives the same settings whatever there is."""

    def suggest(self, history, space, rng):
        return Proposal({"x": 5, "kind": "b"}, notes={"mine": 1})


@pytest.mark.parametrize("rungs", RUNGS)
@pytest.mark.parametrize("base", [*BASES, "stubborn"])
def test_no_base_repeats_settings_known_at_any_budget(rungs, base):
    made = Stubborn() if base == "stubborn" else SEARCHERS[base](**QUICK.get(base, {}))
    study = searched(rungs(1, 9, 3, made), 30, parallel=3)
    assert len(study.trials) == 30
    assert max(Counter(begun(study)).values()) == 1


@pytest.mark.parametrize("rungs", RUNGS)
@pytest.mark.parametrize("base", ["random", "quasi_random", "tpe", "stubborn"])
def test_a_finite_space_is_tried_to_its_end_and_then_the_search_is_over(rungs, base):
    made = Stubborn() if base == "stubborn" else SEARCHERS[base](**QUICK.get(base, {}))
    space = Space(x=Int(4, 6), kind=Choice("a", "b"))
    study = searched(rungs(1, 9, 3, made), 200, space)
    assert sorted(begun(study)) == sorted(key(settings) for settings in space.grid())
    assert len(study.trials) < 12


def test_a_grid_goes_round_settings_asked_for_by_hand():
    study = Study(FINITE, ASHA(1, 9, 3, SEARCHERS["grid"]()))
    # In the middle of the grid, so that it comes to them later.
    by_hand = [study.ask({"x": 1, "kind": kind}).number for kind in ("b", "c")]
    for number in by_hand:
        study.tell(number, 1.0)
    study.optimize(loss, trials=60)
    assert len(set(begun(study))) == len(begun(study)) == 27


def test_a_model_is_told_of_settings_at_other_budgets_and_looks_elsewhere():
    """At the corner of a steep slope, where the best known settings are and a model would go again."""
    space = Space(x=Float(0, 1), y=Float(0, 1))
    study = Study(space, ASHA(1, 9, 3, Bayesian(initial=4)), seed=1)
    study.optimize(lambda trial: trial["x"] + trial["y"] - trial.budget / 10, trials=30)
    assert max(Counter(begun(study)).values()) == 1
    assert sum(record.budget == 9 for record in study.trials) >= 2


def test_the_base_sees_the_settings_of_all_trials_and_the_losses_of_one_budget():
    searcher = Hyperband(1, 9, 3)
    study = searched(searcher, 30)
    view = ASHA(1, 9, 3, Bayesian()).view(study.history(), FINITE)
    most = max(
        budget for budget in searcher.budgets if sum(r.budget == budget for r in study.trials) >= 5
    )
    assert [o.number for o in view] == [r.number for r in study.trials if r.budget == most]
    assert view.tried == {key(record.settings) for record in study.trials}
