from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from metahpo.errors import SearchError
from metahpo.searchers import Choice, Float, Grid, Int, Outcome, Processes, Proposal, Random, Searcher, Space, Study
from metahpo.searchers.front import pareto_front

SPACE = Space(x=Float(0, 1), rule=Choice("sgd", "adam"), beta=Float(0, 1, when={"rule": "adam"}))


@dataclass(frozen=True)
class Given(Searcher):
    """Suggests what it was given, in turn."""

    proposals: tuple[Any, ...]

    def suggest(self, history, space, rng):
        return self.proposals[len(history)] if len(history) < len(self.proposals) else None


def refused(call) -> str:
    with pytest.raises(SearchError) as raised:
        call()
    assert "\n" not in str(raised.value)
    return str(raised.value)


# Asked and told.


@pytest.mark.parametrize("score", [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5), (0.5,), [0.5], Outcome(0.5)])
def test_what_is_a_score(score):
    with Study(SPACE) as study:
        trial = study.ask()
        SPACE.check(trial.settings)
        assert trial["x"] == trial.settings["x"]
        assert study.trials[0].state == "running"
        assert study.best is None
        record = study.tell(trial, score)
        assert (record.state, record.scores, record.score) == ("complete", (0.5,), 0.5)
        assert study.best == record == study.trials[0]


NO_SCORES = {
    "nan": (math.nan, "the score is nan"),
    "inf": (-math.inf, "the score is -inf"),
    "tensor": (torch.tensor(math.nan), "the score is nan"),
    "none": (None, "the objective gave None, expected a number, a tuple of them, or an Outcome"),
    "text": ("0.5", "the objective gave '0.5', expected a number"),
    "huge": (10**400, "the objective gave 1000"),
    "empty": ((), "the score is empty"),
    "two": ((1.0, 2.0), "the objective gave 2 scores, expected 1"),
    "array": (np.zeros(2), "the objective gave array"),
    "outcome": (Outcome(math.nan), "the score is nan"),
}


@pytest.mark.parametrize("name", NO_SCORES)
def test_what_is_none_fails_and_is_never_the_best(name):
    score, said = NO_SCORES[name]
    for direction in ("minimize", "maximize"):
        with Study(SPACE, direction=direction) as study:
            study.optimize(lambda trial: score if trial.number % 2 else float(trial.number), 6)
            assert [t.state for t in study.trials] == ["complete", "failed"] * 3
            assert study.trials[1].error.startswith(said)
            assert study.trials[1].scores is None
            assert study.best.number == (0 if direction == "minimize" else 4)
            assert [o.loss is None for o in study.history()] == [False, True] * 3


def test_told_losses_of_failed_trials_are_the_worst_there_is():
    with Study(SPACE, direction="maximize") as study:
        for score in (3.0, math.nan, -2.0):
            study.tell(study.ask(), score)
        study.ask()
        assert [(o.number, loss) for o, loss in study.history().told] == [(0, -3.0), (1, 2.0), (2, 2.0)]


def test_told_an_error():
    with Study(SPACE) as study:
        record = study.tell(study.ask(), error="no room left")
        assert (record.state, record.error) == ("failed", "no room left")
        assert study.best is None


def test_ask_for_settings_of_ones_own():
    with Study(SPACE) as study:
        assert study.ask({"x": 0.5, "rule": "sgd"}).settings == {"x": 0.5, "rule": "sgd"}
        said = refused(lambda: study.ask({"x": 0.5, "rule": "sgd", "beta": 0.5}))
        assert said == "setting 'beta' should not be there: it exists when {'rule': ('adam',)}"
        assert len(study.trials) == 1


def test_tell_of_no_trial_or_twice():
    with Study(SPACE) as study:
        trial = study.ask()
        study.tell(trial.number, 1.0)
        assert refused(lambda: study.tell(trial, 2.0)) == "tell: trial 0 has ended already: complete"
        assert refused(lambda: study.tell(7, 2.0)) == "tell: there is no trial 7; the study has 1"
        assert study.trials[0].score == 1.0


def test_reports_notes_and_gradients_are_kept_in_plain_values():
    def objective(trial):
        trial.report(2, torch.tensor(0.25))
        trial.report(5, math.nan)
        notes = {"epoch": np.int64(3), "curve": np.arange(2), "grid": torch.eye(2), "a": (1, 2)}
        return Outcome(1.0, {"x": torch.tensor(0.5), "beta": math.nan}, notes)

    with Study(SPACE, direction="maximize") as study:
        record = study.optimize(objective, 1)
        assert record.reports[2] == 0.25
        assert math.isnan(record.reports[5])
        assert record.notes == {"epoch": 3, "curve": [0, 1], "grid": [[1.0, 0.0], [0.0, 1.0]], "a": [1, 2]}
        assert record.gradients == {"x": 0.5}
        # A searcher minimises.
        assert study.history()[0].gradients == {"x": -0.5}


def test_what_cannot_be_kept_fails_the_trial_alone():
    with Study(SPACE) as study:
        study.optimize(lambda trial: Outcome(1.0, notes={(1, 2): 3}), 1)
        assert "keys must be str" in study.trials[0].error
        study.optimize(lambda trial: trial.report(-1, 0.0) or 1.0, 2)
        assert study.trials[1].error == (
            "SearchArgumentError: trial.report: step should be a whole number of at least 0, found -1"
        )


def test_a_searcher_sees_its_own_notes_alone():
    with Study(SPACE, Given((Proposal({"x": 0.5, "rule": "sgd"}, notes={"rung": 1}),))) as study:
        # The objective's may have the same name.
        study.tell(study.ask(), Outcome(1.0, notes={"epochs": 3, "rung": "mine"}))
        assert study.history()[0].notes == {"rung": 1}
        assert study.trials[0].notes == {"rung": "mine", "epochs": 3}
        assert study.history([0])[0].notes == {"rung": 1}
        assert (study.history([0])[0].state, study.history([0])[0].loss) == ("pending", None)


# The best.


def test_best_is_among_those_with_the_largest_budget():
    budgets = [Proposal({"x": x, "rule": "sgd"}, budget) for x, budget in ((0.1, 1), (0.5, 9), (0.2, 3), (0.7, 9))]
    with Study(SPACE, Given(tuple(budgets))) as study:
        assert study.optimize(lambda trial: trial["x"]).number == 1
        assert [t.budget for t in study.trials] == [1, 9, 3, 9]
        assert study.optimize(lambda trial: trial["x"], 99).number == 1
    with Study(SPACE, Given(tuple(budgets[:1]))) as study:
        study.optimize(lambda trial: trial["x"])
        # No budget is the full one.
        study.tell(study.ask({"x": 0.9, "rule": "sgd"}), 0.9)
        assert study.best.number == 1


@pytest.mark.parametrize("directions", [["minimize", "maximize"], ["maximize", "maximize", "minimize"]])
def test_several_objectives_and_their_front(directions):
    rng = np.random.default_rng(0)
    points = rng.integers(0, 5, [40, len(directions)]).astype(float)
    signs = [1 if direction == "minimize" else -1 for direction in directions]
    with Study(SPACE, direction=directions) as study:
        study.optimize(lambda trial: tuple(points[trial.number]) if trial.number % 5 else math.nan, 40)
        found = {t.number for t in study.front}
        assert study.trials[0].state == "failed"
        first = [signs[0] * t.score for t in study.front]
        assert first == sorted(first)
        assert study.best.score == signs[0] * min(signs[0] * t.score for t in study.trials if t.scores)

    def beats(one, other):
        better = [s * a - s * b for s, a, b in zip(signs, points[one], points[other])]
        return max(better) <= 0 and min(better) < 0

    complete = [n for n in range(40) if n % 5]
    assert found == {n for n in complete if not any(beats(other, n) for other in complete)}
    assert len(found) < 20


def test_front_of_none_and_of_equals():
    with Study(SPACE, direction=["minimize", "minimize"]) as study:
        assert study.front == []
    assert pareto_front(np.array([[1.0, 2.0], [1.0, 2.0], [2.0, 2.0]])) == [0, 1]


def test_a_trial_with_too_few_scores_fails():
    with Study(SPACE, direction=["minimize", "minimize"]) as study:
        study.optimize(lambda trial: 1.0, 1)
        assert study.trials[0].error == "the objective gave 1 scores, expected 2"


# Objectives that raise.


def raises(*numbers):
    def objective(trial):
        if trial.number in numbers:
            raise ValueError(f"diverged\nat {trial.number}")
        return 1.0

    return objective


def test_an_objective_that_raises_fails_its_trial_with_the_traceback():
    with Study(SPACE) as study:
        study.optimize(raises(1, 3), 5, max_failures=2)
        assert [t.state for t in study.trials] == ["complete", "failed", "complete", "failed", "complete"]
        lines = study.trials[1].error.splitlines()
        assert lines[0] == "Traceback (most recent call last):"
        assert 'raise ValueError(f"diverged\\nat {trial.number}")' in study.trials[1].error
        assert lines[-2:] == ["ValueError: diverged", "at 1"]


def test_after_so_many_failures_in_a_row_it_stops_and_says_why():
    with Study(SPACE) as study:
        said = refused(lambda: study.optimize(raises(1, 3, 4, 5, 6), 9, max_failures=3))
        last = "trial 5: ValueError: diverged at 5 (the study keeps the tracebacks)"
        assert said == f"stopped after 3 failures in a row; the last, {last}"
        assert len(study.trials) == 6
        # It can be gone on with.
        study.optimize(raises(6), 9, max_failures=3)
        assert [t.state for t in study.trials][6:] == ["failed", "complete", "complete"]


def test_one_that_exits_fails_too_and_one_that_is_interrupted_is_let_through():
    with Study(SPACE) as study:
        study.optimize(lambda trial: exit(3), 1)
        assert study.trials[0].error.endswith("SystemExit: 3\n")

        def interrupt(trial):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            study.optimize(interrupt, 2)
        assert study.trials[1].state == "running"
        study.optimize(lambda trial: 1.0, 2)
        assert study.trials[1].state == "complete"


# Run.


def test_optimize_runs_so_many_in_all_and_tells_of_each():
    seen = []
    with Study(SPACE) as study:
        study.optimize(lambda trial: trial["x"], 3, on_trial=seen.append)
        study.optimize(lambda trial: trial["x"], 3)
        best = study.optimize(lambda trial: trial["x"], 5, on_trial=seen.append)
        assert seen == study.trials
        assert len(seen) == 5
        assert best.score == min(t.score for t in seen)


def test_no_trial_is_begun_once_the_budget_is_used():
    proposals = tuple(
        Proposal({"x": 0.5, "rule": "sgd"}, b, parent) for b, parent in ((4, None), (6, 0), (9, 1), (1, 0))
    )
    with Study(SPACE, Given(proposals)) as study:
        # 4, and 2 more of the trial that goes on from it.
        study.optimize(lambda trial: 1.0, budget=6)
        assert [t.budget for t in study.trials] == [4, 6]
        study.optimize(lambda trial: 1.0, budget=7)
        assert [t.parent for t in study.trials] == [None, 0, 1]


def test_a_promoted_trial_knows_its_parents_folder(tmp_path):
    proposals = tuple(Proposal({"x": 0.5, "rule": "sgd"}, b, parent) for b, parent in ((1, None), (3, 0)))

    def objective(trial):
        if trial.parent_folder:
            return float((trial.parent_folder / "kept").read_text()) + trial.budget
        (trial.folder / "kept").write_text("40")
        return 0.0

    with Study(SPACE, Given(proposals), folder=tmp_path) as study:
        study.optimize(objective)
        assert [t.score for t in study.trials] == [0.0, 43.0]


def test_a_study_in_memory_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = []
    with Study(SPACE) as study:
        study.optimize(lambda trial: folders.append(trial.folder) or float(trial.folder.is_dir()), 2)
        assert [t.score for t in study.trials] == [1.0, 1.0]
    assert not list(tmp_path.iterdir())
    assert not any(folder.exists() for folder in folders)


def test_a_searcher_that_leaves_the_space_is_told_so():
    with Study(SPACE, Given(({"x": 2.0, "rule": "sgd"},))) as study:
        said = refused(study.ask)
        assert re.search(r"^Given\(.*\) suggested what is not in the space: setting 'x' should be a number in", said)
        assert study.trials == []


def test_ask_says_whether_it_is_over_or_waits():
    with Study(SPACE, Given(({"x": 0.5, "rule": "sgd"},))) as study:
        trial = study.ask()
        assert "suggests nothing before a trial that is at work is told" in refused(study.ask)
        study.tell(trial, 1.0)
        assert "suggests nothing any more: it is over" in refused(study.ask)


# Bad input.


class Shy(Searcher):
    """Not a dataclass; its text has no address, by which a study would not know it again."""


def test_bad_input():
    for direction in ("min", [], ["minimize", "up"], 3, None):
        assert "direction: should be minimize, maximize, or a list" in refused(
            lambda d=direction: Study(SPACE, direction=d)
        )
    for seed in (-1, 0.5, None, True):
        assert "seed should be a whole number of at least 0" in refused(lambda s=seed: Study(SPACE, seed=s))
    with Study(Space(n=Int(0, 3)), Grid()) as study:
        for workers in (0, -1, 2.5, "2", None):
            said = refused(lambda w=workers: study.optimize(lambda trial: 1.0, 1, w))
            assert "workers should be a whole number of at least 1" in said
        assert "threads should be a whole number of at least 1 and at most" in refused(lambda: Processes(2, threads=0))
        assert refused(lambda: study.optimize(3)) == "optimize: objective should be a function of a trial, found 3"
        assert study.trials == []
    assert repr(Shy()) == "Shy()"
    assert repr(Random()) == "Random()"


def test_a_closed_study_takes_nothing_more():
    study = Study(SPACE)
    trial = study.ask()
    study.close()
    for call in (study.ask, lambda: study.tell(trial, 1.0), lambda: study.optimize(lambda trial: 1.0, 2)):
        assert "is closed" in refused(call)
    assert len(study.trials) == 1
