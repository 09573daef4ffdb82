from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from metahpo.errors import SearchError
from metahpo.searchers import (
    ASHA,
    BOHB,
    Choice,
    Float,
    Grid,
    History,
    Hyperband,
    Int,
    Observation,
    Proposal,
    Random,
    Searcher,
    Space,
    Study,
    SuccessiveHalving,
)

SPACE = Space(x=Float(0, 1), kind=Choice("a", "b"), y=Float(0, 1, when={"kind": "b"}))
ALL = [SuccessiveHalving, Hyperband, ASHA, BOHB]


def score(trial):
    return (trial["x"] - 0.3) ** 2 + trial.settings.get("y", 0.5) + 0.1 * np.sin(50 * trial["x"]) / trial.budget


def rung(number, settings, losses, budget, rung=0, bracket=0, first=0, parents=None):
    """Observations of one rung; a loss of None: pending, of "failed": failed."""
    states = {None: "pending", "failed": "failed"}
    return [
        Observation(
            first + i,
            settings[i] if settings else {"x": i / number},
            states.get(loss, "complete"),
            (loss,) if isinstance(loss, float) else None,
            budget,
            parents[i] if parents else None,
            {"bracket": bracket, "rung": rung},
        )
        for i, loss in enumerate(losses)
    ]


def suggest(searcher, observations, space=None, seed=0):
    rng = np.random.default_rng(seed)
    return searcher.suggest(History(observations), space or Space(x=Float(0, 1)), rng)


# Promotion by hand.


def test_best_third_goes_on_best_first_from_its_own_trial():
    losses = [0.5, 0.1, 0.9, 0.3, 0.3, 0.8, 0.2, 0.7, 0.6]
    searcher, history = SuccessiveHalving(1, 9, 3), rung(9, None, losses, 1)
    for i, parent in enumerate([1, 6, 3]):
        proposal = suggest(searcher, history)
        assert (proposal.budget, proposal.parent, proposal.settings) == (3, parent, {"x": parent / 9})
        assert proposal.notes == {"bracket": 0, "rung": 1}
        history += rung(1, [proposal.settings], [0.1 + i], 3, 1, 0, len(history), [parent])
    proposal = suggest(searcher, history)
    assert (proposal.budget, proposal.parent) == (9, 9)
    history += rung(1, [proposal.settings], [0.0], 9, 2, 0, len(history), [9])
    assert suggest(searcher, history).notes == {"bracket": 1, "rung": 0}


def test_a_rung_with_a_trial_at_work_is_waited_for_while_the_next_bracket_begins():
    searcher = SuccessiveHalving(1, 9, 3)
    history = rung(9, None, [0.5, 0.1, None, 0.3, 0.4, 0.8, 0.2, 0.7, 0.6], 1)
    proposal = suggest(searcher, history)
    assert proposal.parent is None
    assert proposal.notes == {"bracket": 1, "rung": 0}
    history[2] = rung(9, None, [0.0] * 3, 1)[2]
    assert suggest(searcher, history).parent == 2


def test_failed_trials_end_a_rung_and_never_go_on():
    searcher = SuccessiveHalving(1, 9, 3)
    history = rung(9, None, ["failed", 0.1, "failed", "failed", "failed", 0.8, "failed", "failed", "failed"], 1)
    parents = []
    while (proposal := suggest(searcher, history)).notes["bracket"] == 0:
        parents.append(proposal.parent)
        failed = "failed" if proposal.parent == 1 else 0.5
        history += rung(1, [proposal.settings], [failed], proposal.budget, proposal.notes["rung"], 0, len(history))
        history[-1] = Observation(**{**vars(history[-1]), "parent": proposal.parent})
    # Two could go on to the second rung; the better one failed there, so the other one goes on to the last.
    assert parents == [1, 5, 10]
    history = rung(9, None, ["failed"] * 9, 1)
    assert suggest(searcher, history).notes == {"bracket": 1, "rung": 0}


def test_other_trials_of_the_study_are_let_be():
    searcher = SuccessiveHalving(1, 9, 3)
    own = Observation(0, {"x": 0.5}, "complete", (-9.0,))
    proposal = suggest(searcher, [own, *rung(9, None, [float(i) for i in range(9)], 1, first=1)])
    assert proposal.parent == 1


def test_several_objectives_promote_as_many():
    study = Study(SPACE, SuccessiveHalving(1, 9, 3), direction=["minimize", "maximize"])
    study.optimize(lambda trial: (trial["x"], trial["x"] + trial.settings.get("y", 0)), trials=39)
    assert [r.notes["rung"] for r in study.trials] == 3 * ([0] * 9 + [1] * 3 + [2])


# The ladder.


def test_budgets_are_whole_where_both_ends_are():
    assert SuccessiveHalving(1, 50, 3).budgets == [2, 6, 17, 50]
    assert SuccessiveHalving(0.1, 8, 2).budgets == [0.125, 0.25, 0.5, 1, 2, 4, 8]
    assert SuccessiveHalving(1, 3, 1.2).budgets == [1, 2, 3]
    assert all(isinstance(budget, int) for budget in SuccessiveHalving(1.0, 81.0).budgets)
    assert SuccessiveHalving(1, 243, 3).budgets == [1, 3, 9, 27, 81, 243]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"min_budget": 9, "max_budget": 9}, "min_budget should be below max_budget, found 9 and 9"),
        ({"min_budget": 0}, "min_budget should be above 0, found 0"),
        ({"eta": 1}, "eta should be above 1, found 1"),
        ({"eta": float("nan")}, "eta should be a finite number, found nan"),
        ({"max_budget": "9"}, "max_budget should be a finite number, found '9'"),
        ({"min_budget": 9, "max_budget": 10}, "at least eta times min_budget"),
        ({"base": ASHA()}, "base should be a searcher without budgets of its own, found ASHA("),
        ({"base": "random"}, "base should be a searcher without budgets of its own, found 'random'"),
    ],
)
def test_bad_options_give_one_line(kind, options, expected):
    with pytest.raises(SearchError, match=f"^{kind.__name__}: ") as error:
        kind(**options)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_base_is_asked_whether_it_fits_the_space():
    with pytest.raises(SearchError, match="x: Float"):
        Study(Space(x=Float(0, 1)), SuccessiveHalving(base=Grid()))


# Whatever the searcher.


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("parallel", [1, 4])
def test_a_promoted_trial_has_its_parents_settings_and_the_next_budget(kind, parallel):
    searcher = kind(1, 27, 3)
    study = Study(SPACE, searcher, parallel=parallel, seed=3)
    study.optimize(score, trials=150)
    on = [r for r in study.trials if r.parent is not None]
    assert len(on) > 30
    for record in on:
        parent = study.trials[record.parent]
        assert record.settings == parent.settings
        assert searcher.budgets.index(record.budget) == searcher.budgets.index(parent.budget) + 1
    assert len({r.parent for r in on}) == len(on)
    assert study.best.budget == 27


@pytest.mark.parametrize("kind", ALL)
def test_a_search_goes_on_after_any_trial_as_if_never_stopped(kind):
    def faulty(trial):
        if trial["x"] > 0.8 or (trial.budget > 3 and trial["x"] < 0.2):
            raise ValueError("a trial that fails")
        return score(trial)

    whole = Study(SPACE, kind(1, 9, 3), parallel=3, seed=1)
    whole.optimize(faulty, trials=60, max_failures=99)
    pieces = Study(SPACE, kind(1, 9, 3), parallel=3, seed=1)
    for trials in range(1, 61):
        pieces.optimize(faulty, trials=trials, max_failures=99)
    found = [(r.settings, r.budget, r.parent, r.state) for r in pieces.trials]
    assert found == [(r.settings, r.budget, r.parent, r.state) for r in whole.trials]
    states = {r.number: r.state for r in whole.trials}
    assert list(states.values()).count("failed") > 5
    assert all(states[r.parent] == "complete" for r in whole.trials if r.parent is not None)


@pytest.mark.parametrize("kind", ALL)
def test_a_search_whose_trials_all_fail_stops(kind):
    def fails(trial):
        raise ValueError("no")

    study = Study(SPACE, kind(1, 9, 3), parallel=2)
    with pytest.raises(SearchError, match="after 30 failures in a row"):
        study.optimize(fails, trials=100, max_failures=30)
    assert not any(r.parent for r in study.trials)


# The base.


@dataclass(frozen=True)
class Recording(Searcher):
    """Notes what it sees; ``waits``: one trial at a time."""

    waits: bool = False

    def suggest(self, history, space, rng):
        if self.waits and history.pending:
            return None
        seen = [[o.number, o.state, o.loss, o.budget, o.parent, o.notes.get("mine")] for o in history]
        return Proposal(space.sample(rng), notes={"seen": seen, "mine": len(history)})


@pytest.mark.parametrize("kind", [SuccessiveHalving, Hyperband, ASHA])
def test_base_sees_comparable_trials_alone(kind):
    searcher = kind(1, 9, 3, Recording())
    study = Study(Space(x=Float(0, 1)), searcher, seed=5)
    study.optimize(score_x, trials=80)
    most = 0
    for record in study.trials:
        if record.parent is not None:
            assert record.notes["base"] == study.trials[record.parent].notes["base"]
            continue
        earlier = study.trials[: record.number]
        counts = {budget: sum(r.budget == budget for r in earlier) for budget in searcher.budgets}
        at = max((b for b in counts if counts[b] >= 4), default=1)
        most = max(most, at)
        seen = record.notes["base"]["seen"]
        assert [entry[:3] for entry in seen] == [[r.number, "complete", r.score] for r in earlier if r.budget == at]
        assert all(entry[3:5] == [None, None] for entry in seen)
        assert [entry[5] for entry in seen] == [r.notes["base"]["mine"] for r in earlier if r.budget == at]
    assert most == 9


def score_x(trial):
    return (trial["x"] - 0.3) ** 2 / trial.budget


def test_base_sees_what_is_at_work_or_failed_below_as_such():
    history = [
        *rung(9, None, [0.5, 0.1, "failed", 0.3, 0.4, 0.8, 0.2, None, 0.6], 1),
        *rung(4, [{"x": i / 9} for i in (1, 6, 3, 4)], [0.1, 0.2, 0.3, 0.4], 3, 1, 0, 9, [1, 6, 3, 4]),
        *rung(1, [{"x": 1 / 9}], [None], 9, 2, 0, 13, [9]),
    ]
    seen = suggest(ASHA(1, 9, 3, Recording()), history).notes["base"]["seen"]
    # Of trial 9, which goes on above, the loss at the comparable budget is known.
    assert [(number, state) for number, state, *_ in seen] == [
        (2, "failed"),
        (7, "pending"),
        *((number, "complete") for number in (9, 10, 11, 12)),
    ]


def test_a_base_that_looks_at_no_losses_sees_one_trial_for_each_of_its_settings():
    grid = Space(x=Int(1, 27))
    study = Study(grid, Hyperband(1, 9, 3, Grid()))
    study.optimize(score, trials=100)
    roots = [r.settings["x"] for r in study.trials if r.parent is None]
    assert roots == list(range(1, 28))
    # All that there were went through their brackets, the last of which had fewer than planned; then it was over.
    assert len(study.trials) < 100
    assert all(r.state == "complete" for r in study.trials)


def test_settings_that_run_out_within_a_bracket_go_on_all_the_same():
    study = Study(Space(x=Int(1, 5)), SuccessiveHalving(1, 9, 3, Grid()))
    study.optimize(lambda trial: trial["x"], trials=100)
    assert [(r.settings["x"], r.budget) for r in study.trials] == [
        *((x, 1) for x in range(1, 6)),
        *((x, 3) for x in (1, 2, 3)),
        (1, 9),
    ]


@pytest.mark.parametrize("kind", ALL)
def test_a_base_that_has_to_wait_is_waited_for(kind):
    searcher = kind(1, 9, 3, Recording(waits=True), **({"random_fraction": 0} if kind is BOHB else {}))
    study = Study(Space(x=Float(0, 1)), searcher, parallel=3)
    study.optimize(score_x, trials=60)
    assert len(study.trials) == 60
    assert study.best.budget == 9


def test_random_search_and_its_halving_begin_with_the_same_settings():
    pair = [Study(SPACE, searcher, seed=4) for searcher in (Random(), SuccessiveHalving(1, 27, 3))]
    for study in pair:
        study.optimize(lambda trial: trial["x"], trials=27)
    assert [r.settings for r in pair[0].trials] == [r.settings for r in pair[1].trials]
