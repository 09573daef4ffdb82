from __future__ import annotations

import math

import numpy as np
import pytest

from metahpo.errors import SearchError
from metahpo.searchers import (
    TPE,
    Choice,
    Float,
    Gradient,
    Grid,
    History,
    Int,
    Observation,
    Outcome,
    Proposal,
    QuasiRandom,
    Random,
    Space,
    Study,
)
from metahpo.searchers.descent import Descent
from metahpo.searchers.gradient import CHAIN, HOP, stretch
from metahpo.testing import check_searcher

WIDE = Space(x=Float(-5, 10), y=Float(-5, 10))
RATES = Space(lr=Float(1e-5, 10, log=True), decay=Float(1e-6, 1, log=True), momentum=Float(0, 0.999))


def rosenbrock(trial):
    x, y = trial["x"], trial["y"]
    score = (1 - x) ** 2 + 100 * (y - x * x) ** 2
    return Outcome(score, {"x": -2 * (1 - x) - 400 * x * (y - x * x), "y": 200 * (y - x * x)})


def rates(trial):
    """A bowl in the logarithms of rate and decay, tilted, least (0.1) at lr 0.02, decay 0.001, momentum 0.9."""
    a, b, c = math.log(trial["lr"] / 0.02), math.log(trial["decay"] / 0.001), 10 * (trial["momentum"] - 0.9)
    by_a, by_b = 2 * a + b, a + 1.2 * b
    gradients = {"lr": by_a / trial["lr"], "decay": by_b / trial["decay"], "momentum": 20 * c}
    return Outcome(0.1 + a * a + a * b + 0.6 * b * b + c * c, gradients)


def best(space, searcher, objective, trials, **options):
    with Study(space, searcher, **options) as study:
        return study.optimize(objective, trials, max_failures=10**9).score


def at_random(space, objective, trials, seed):
    rng = np.random.default_rng(seed)
    return min(objective(space.sample(rng)).score for _ in range(trials))


@pytest.mark.parametrize("seed", range(3))
def test_rosenbrocks_valley_and_a_tilted_bowl_of_logarithms_take_far_fewer_trials_than_at_random(seed):
    # Its curved valley wants the last digits, which no training is worth.
    fine = Gradient(shortest=1e-6, tolerance=1e-8, patience=100)
    assert best(WIDE, fine, rosenbrock, 80, seed=seed) < 1e-3
    assert at_random(WIDE, rosenbrock, 1000, seed) > 1e-2
    assert best(RATES, Gradient(), rates, 20, seed=seed) < 0.1 + 1e-3
    assert at_random(RATES, rates, 1000, seed) > 0.1 + 2e-2


def test_a_quadratic_of_n_settings_is_exact_once_its_curvature_is_known():
    # The symmetric rank-one formula has the whole curvature after n steps that are independent.
    dimensions = 10
    spread = np.random.default_rng(0).normal(size=(dimensions, dimensions))
    curvature, least = spread @ spread.T + np.eye(dimensions), np.linspace(0.3, 0.7, dimensions)
    space = Space({f"x{i}": Float(0, 1) for i in range(dimensions)})

    def objective(trial):
        away = np.array([trial[name] for name in space]) - least
        return Outcome(away @ curvature @ away, dict(zip(space, 2 * curvature @ away)))

    searcher = Gradient(starts=1, tolerance=1e-12, shortest=1e-9, patience=100)
    scores = [record.score for record in _records(space, searcher, objective, 4 * dimensions)]
    assert min(scores) < 1e-8 * scores[0]


def test_a_score_to_maximise_is_climbed():
    def height(trial):
        found = rates(trial)
        return Outcome(-found.score, {name: -value for name, value in found.gradients.items()})

    assert best(RATES, Gradient(), height, 25, direction="maximize") > -0.11


@pytest.mark.parametrize(
    "setting",
    [
        Float(-2, 6),
        Float(1e-4, 3, log=True),
        Int(1, 1000),
        Int(2, 500, log=True),
        Float(0, 1, step=0.001),
        Int(0, 1000, step=2),
    ],
)
def test_the_chain_rule_through_the_unit_interval_is_that_of_the_settings_own_places(setting):
    places = np.linspace(0.2, 0.8, 7)
    # Over many steps, where there are steps.
    wide = 0.1 if math.isfinite(setting.count) else 1e-6
    for place in places:
        value = setting.at(place)
        middle = setting.unit(value)
        rise = setting.at(middle + wide) - setting.at(middle - wide)
        if setting.log and wide == 0.1:
            # Of a log range over so much the mean slope is that at the middle times sinh(x) / x.
            x = wide * math.log((setting.high + 0.5) / (setting.low - 0.5))
            rise /= math.sinh(x) / x
        assert stretch(setting, value) == pytest.approx(rise / (2 * wide), rel=0.06)


def test_steps_and_whole_numbers_reach_their_least_value():
    space = Space(a=Int(0, 40), b=Float(0, 10, step=0.5), c=Int(1, 3), d=Int(1, 1000, log=True))
    least = {"a": 31, "b": 3.5, "c": 3, "d": 200}

    def objective(trial):
        away = {name: trial[name] - value for name, value in least.items()}
        away["d"] = math.log(trial["d"] / 200)
        gradients = {"a": away["a"] / 200, "b": away["b"] / 10, "c": 2 * away["c"], "d": 2 * away["d"] / trial["d"]}
        return Outcome(away["a"] ** 2 / 400 + away["b"] ** 2 / 20 + away["c"] ** 2 + away["d"] ** 2, gradients)

    with Study(space, Gradient()) as study:
        found = study.optimize(objective, 40).settings
    assert (found["c"], abs(found["a"] - 31) <= 1, abs(found["b"] - 3.5) <= 0.5) == (3, True, True)
    assert found["d"] == pytest.approx(200, rel=0.1)


def test_what_has_no_gradient_is_kept_along_a_chain_and_comes_from_the_base():
    space = Space(
        kind=Choice("bad", "good"),
        lr=Float(1e-4, 1, log=True),
        depth=Int(1, 5),
        momentum=Float(0, 1, when={"kind": "good"}),
    )

    def objective(trial):
        away = math.log(trial["lr"] / 0.03)
        score = away**2 + abs(trial["depth"] - 2) + 3 * (trial["kind"] == "bad")
        gradients = {"lr": 2 * away / trial["lr"]}
        if trial["kind"] == "good":
            score, gradients["momentum"] = score + (trial["momentum"] - 0.5) ** 2, 2 * (trial["momentum"] - 0.5)
        return Outcome(score, gradients)

    # The smallest of TPE's starts.
    records = _records(space, Gradient(TPE(initial=4)), objective, 60)
    chains: dict[int, list] = {}
    for record in records:
        chains.setdefault(record.notes[CHAIN], []).append(record)
        space.check(record.settings)
    assert len(chains) > 4 and max(map(len, chains.values())) > 4
    for members in chains.values():
        assert len({(r.settings["kind"], r.settings["depth"]) for r in members}) == 1
    best = min(records, key=lambda r: r.score)
    assert (best.settings["kind"], best.settings["depth"]) == ("good", 2)
    assert best.score < 1e-2


def test_a_setting_that_others_depend_on_stays_as_it_is():
    space = Space(layers=Int(1, 9), width=Int(1, 9, when={"layers": [2, 3]}), x=Float(0, 1))
    # All point away from the start, which has layers 2.
    objective = lambda trial: Outcome(trial["x"] + trial["layers"], {"x": 1.0, "layers": 1.0, "width": 1.0})  # noqa: E731
    for record in (records := _records(space, Gradient(starts=1), objective, 12)):
        start = records[record.notes[CHAIN]]
        assert record.settings["layers"] == start.settings["layers"]


def test_without_gradients_all_trials_are_the_bases():
    space, objective = Space(x=Float(0, 1), y=Int(1, 9)), lambda trial: trial["x"]
    for base in (Random(), QuasiRandom(), TPE(initial=3)):
        own, through = (
            [r.settings for r in _records(space, searcher, objective, 12)] for searcher in (base, Gradient(base))
        )
        assert own == through
    grid = Space(y=Int(1, 4), z=Choice("a", "b"))
    assert len(_records(grid, Gradient(Grid()), lambda trial: trial["y"], 100)) == 8


def test_a_failed_trial_halves_the_step_and_steps_back():
    space = Space(x=Float(0, 1))

    def objective(trial):
        if trial["x"] > 0.65:
            raise ValueError("diverged")
        return Outcome(1 - trial["x"], {"x": -1.0})

    history = [_seen(0, {"x": 0.6}, 0.4, {"x": -1.0})]
    steps = []
    for number in range(1, 4):
        proposal = Gradient(starts=1, radius=0.1).suggest(History(history), space, np.random.default_rng(0))
        assert proposal.notes == {CHAIN: 0}
        x = proposal.settings["x"]
        steps.append(x - 0.6)
        history.append(_seen(number, {"x": x}, None, {}, CHAIN=0))
    assert steps == pytest.approx([0.1, 0.05, 0.025])
    records = _records(space, Gradient(starts=1), objective, 15, seed=2)
    complete = [r for r in records if r.state == "complete"]
    assert max(r.settings["x"] for r in complete) > 0.64
    assert len(complete) < len(records)


def test_a_crease_does_not_throw_the_descent_off():
    # As a training at the edge of chaos: a ripple too small to matter has slopes that dwarf all others.
    def objective(trial):
        x = trial["x"]
        return Outcome((x - 0.7) ** 2 + 1e-5 * math.sin(1e6 * x) * (x > 0.6), {"x": 2 * (x - 0.7) + _ripple(x)})

    def _ripple(x):
        return 10 * math.cos(1e6 * x) * (x > 0.6)

    for seed in range(5):
        assert best(Space(x=Float(0, 1)), Gradient(starts=1), objective, 20, seed=seed) < 2e-3


def test_when_a_chain_is_over_some_trials_are_draws_near_its_best():
    space = Space(x=Float(-8, 12), y=Float(1, 100, log=True))

    def objective(trial):
        away = math.log(trial["y"] / 10)
        return Outcome(trial["x"] ** 2 + away**2, {"x": 2 * trial["x"], "y": 2 * away / trial["y"]})

    for share in (0.0, 0.25):
        records = _records(space, Gradient(hops=share, radius=0.1), objective, 40)
        hops = [r for r in records if HOP in r.notes]
        assert len(hops) == 40 * share
        assert all(np.linalg.norm(space.encode(r.settings) - [0.4, 0.5]) < 0.4 for r in hops)
        # The others make new starts.
        assert len({r.notes[CHAIN] for r in records}) > 3


def test_trials_at_work_leave_their_chain_alone_and_others_go_on():
    space = Space(x=Float(0, 1))
    starts = [_seen(i, {"x": x}, x, {"x": 1.0}) for i, x in enumerate((0.5, 0.7, 0.9))]
    searcher, rng = Gradient(starts=3, radius=0.1), np.random.default_rng(0)
    history, chains = list(starts), []
    for _ in range(4):
        proposal = searcher.suggest(History(history), space, rng)
        chains.append(proposal.notes[CHAIN])
        pending = Observation(len(history), proposal.settings, "pending", notes=proposal.notes)
        history.append(pending)
    # The best first; then, as all are at work, a new start.
    assert chains == [0, 1, 2, 6]
    assert [o.settings["x"] for o in history[3:6]] == pytest.approx([0.4, 0.6, 0.8])


def test_a_study_for_two_workers_that_is_resumed_gives_the_same_trials(tmp_path):
    whole = _records(RATES, Gradient(), rates, 20, parallel=2)
    assert min(r.score for r in whole) < 0.15
    for cut in (7, 20):
        resumed = _records(RATES, Gradient(), rates, cut, storage=tmp_path / "study.db", parallel=2)
    assert [(r.settings, r.notes, r.score) for r in resumed] == [(r.settings, r.notes, r.score) for r in whole]


def test_the_base_sees_each_start_with_the_best_of_its_chain():
    seen = []

    class Spy(Random):
        def suggest(self, history, space, rng):
            seen[:] = [(o.number, o.settings["x"], o.loss, o.state) for o in history]
            return Proposal({"x": 0.5}, notes={"spy": 1})

    history = [
        _seen(0, {"x": 0.3}, 0.3, {"x": 1.0}),
        _seen(1, {"x": 0.9}, None, {}),
        _seen(2, {"x": 0.2}, 0.2, {"x": 1.0}, CHAIN=0),
        Observation(3, {"x": 0.8}, "pending"),
    ]
    proposal = Gradient(Spy(), starts=9).suggest(History(history), Space(x=Float(0, 1)), np.random.default_rng(0))
    assert seen == [(0, 0.3, 0.2, "complete"), (1, 0.9, None, "failed"), (3, 0.8, None, "pending")]
    assert proposal.notes == {"spy": 1, CHAIN: 4}


def test_a_descent_stays_in_the_box_and_ends_where_it_is_pushed_into_a_corner():
    descent = Descent(
        np.array([0.05, 0.5]),
        1.0,
        np.array([1.0, 0.0]),
        radius=0.1,
        shortest=1e-3,
        grain=np.zeros(2),
        tolerance=1e-6,
    )
    point = descent.next()
    assert point == pytest.approx([0.0, 0.5])
    descent.see(point, 0.95, np.array([1.0, 0.0]))
    assert descent.next() is None


def test_it_conforms_with_other_bases():
    check_searcher(Gradient(TPE(initial=3), starts=2), trials=12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"starts": 0}, "starts should be a whole number of at least 1, found 0"),
        ({"patience": 1.5}, "patience should be a whole number of at least 1, found 1.5"),
        ({"radius": 0.001}, "expected 0 < shortest < radius <= 0.5 (shares of each range), found shortest=0.004"),
        ({"hops": 1}, "hops should be a share from 0 to below 1, found 1"),
        ({"base": "random"}, "base should be a searcher, found 'random'"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(SearchError, match=r"^Gradient: ") as caught:
        Gradient(**options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_base_that_cannot_search_the_space_refuses_it():
    with pytest.raises(SearchError, match="continuous range"):
        Study(Space(x=Float(0, 1)), Gradient(Grid()))


def _records(space, searcher, objective, trials, workers=1, **options):
    with Study(space, searcher, **options) as study:
        study.optimize(objective, trials, workers=workers, max_failures=10**9)
        return study.trials


def _seen(number, settings, loss, gradients, **notes):
    notes = {CHAIN: notes["CHAIN"]} if notes else {}
    state = "failed" if loss is None else "complete"
    return Observation(number, settings, state, None if loss is None else (loss,), notes=notes, gradients=gradients)
