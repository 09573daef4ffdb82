from __future__ import annotations

import math
import warnings

import numpy as np
import optuna
import pytest

from metahpo.searchers import TPE, Choice, Float, History, Int, Observation, Space
from metahpo.testing.running import run

SPACE = Space(
    rate=Float(1e-4, 1, log=True),
    share=Float(0, 1, step=0.1),
    width=Int(1, 100, log=True),
    batch=Int(4, 30, step=4),
    rule=Choice("sgd", "adam"),
    beta=Float(0.5, 1, when={"rule": "adam"}),
)


def loss(trial):
    s = trial.settings
    return (math.log10(s["rate"]) + 2) ** 2 + (s["share"] - 0.3) ** 2 + s["width"] / 100 + (s["rule"] == "sgd")


def asked(trial):
    """What Optuna's own study suggests, in the order of the space."""
    given = {
        "rate": trial.suggest_float("rate", 1e-4, 1, log=True),
        "share": trial.suggest_float("share", 0, 1, step=0.1),
        "width": trial.suggest_int("width", 1, 100, log=True),
        "batch": trial.suggest_int("batch", 4, 28, step=4),
        "rule": ("sgd", "adam")[trial.suggest_categorical("rule", (0, 1))],
    }
    if given["rule"] == "adam":
        given["beta"] = trial.suggest_float("beta", 0.5, 1)
    return given


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("working", [0, 3])
def test_suggests_what_optunas_own_study_does(working):
    records = run(TPE(initial=10), SPACE, loss, 40)
    observations = [
        Observation(r.number, r.settings, "pending" if r.number >= 40 - working else "complete", r.scores)
        for r in records
    ]
    observations[5] = Observation(5, records[5].settings, "failed")
    worst = max(r.score for r in records[: 40 - working] if r.number != 5)
    study = optuna.create_study()
    for o in observations:
        # A study of Optuna's is filled in by its own hand: fixed values, asked for and told.
        study.enqueue_trial({n: ("sgd", "adam").index(v) if n == "rule" else v for n, v in o.settings.items()})
        trial = study.ask()
        asked(trial)
        if o.state != "pending":
            study.tell(trial, worst if o.state == "failed" else o.loss)
    for number in range(8):
        seed = int(np.random.default_rng([3, number]).integers(2**32))
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=1, multivariate=True, group=True, seed=seed)
        expected = asked(trial := study.ask())
        found = TPE(initial=10).suggest(History(observations), SPACE, np.random.default_rng([3, number]))
        numbers = [name for name in expected if name != "rule"]
        assert found["rule"] == expected["rule"] and list(found) == list(expected)
        assert [found[name] for name in numbers] == pytest.approx([expected[name] for name in numbers], rel=1e-12)
        # Lest it be one at work.
        study.tell(trial, state=optuna.trial.TrialState.FAIL)


def suggestions(observations, space, count=150):
    return [TPE().suggest(History(observations), space, np.random.default_rng(seed)) for seed in range(count)]


def test_options_that_are_equal_in_python_are_three():
    space = Space(odd=Choice(1, 1.0, True))
    told = [Observation(i, {"odd": odd}, "complete", (odd is not True,)) for i, odd in enumerate([1, 1.0, True] * 8)]
    found = [repr(settings["odd"]) for settings in suggestions(told, space)]
    assert found.count("True") > 100


def test_failed_trials_keep_it_away():
    space = Space(x=Float(0, 1))
    told = [Observation(i, {"x": x}, "complete", (x,)) for i, x in enumerate(np.linspace(0.3, 1, 20).tolist())]
    failed = [Observation(20 + i, {"x": x}, "failed") for i, x in enumerate(np.linspace(0, 0.28, 20).tolist())]

    def below(observations):
        return np.mean([settings["x"] < 0.28 for settings in suggestions(observations, space)])

    assert below(told) > 0.4 and below(told + failed) < 0.25


def test_trials_at_work_are_kept_away_from():
    space = Space(x=Float(0, 1))
    told = [Observation(i, {"x": i / 20}, "complete", (abs(i / 20 - 0.5),)) for i in range(20)]
    working = [Observation(20 + i, {"x": 0.5}, "pending") for i in range(8)]

    def near(history):
        return np.mean([abs(settings["x"] - 0.5) < 0.03 for settings in suggestions(history, space)])

    assert near(told) > near(told + working) + 0.15


def test_says_nothing_of_what_is_new_in_optuna():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(TPE(initial=2), SPACE, loss, 5)
