from __future__ import annotations

import itertools

import numpy as np
import pytest

from metahpo.searchers import Choice, DifferentialEvolution, Float, History, Observation, Space
from metahpo.testing.running import run

SPACE = Space(x=Float(0, 1), y=Float(0, 1), z=Float(0, 1))
SIZE = 6


def loss(trial):
    return sum((value - 0.4) ** 2 for value in trial.settings.values())


def members(records):
    """The best trial of each place, later ones of equal ones."""
    held = {}
    for record in records:
        place = record.number % SIZE
        if place not in held or record.score <= held[place].score:
            held[place] = record
    return held


def point(record):
    return np.array([record.settings[name] for name in SPACE])


def folded(points):
    return 1 - abs((points % 2) - 1)


@pytest.mark.parametrize("strategy", ["rand/1/bin", "best/1/bin"])
def test_each_trial_is_a_member_plus_the_difference_of_two_others(strategy):
    searcher = DifferentialEvolution(population=SIZE, weight=0.7, crossover=1, strategy=strategy)
    records = run(searcher, SPACE, loss, 80)
    for number in range(SIZE, 80):
        held, new = members(records[:number]), point(records[number])
        others = [place for place in held if place != number % SIZE]
        best = min(held, key=lambda place: held[place].score)
        found = [
            a
            for a, b, c in itertools.product(held, others, others)
            if b != c and np.allclose(folded(point(held[a]) + 0.7 * (point(held[b]) - point(held[c]))), new, atol=1e-9)
        ]
        assert found and (strategy == "rand/1/bin" or best in found)


def test_the_rest_is_the_places_own():
    records = run(DifferentialEvolution(population=SIZE, crossover=0), SPACE, loss, 80)
    for number in range(SIZE, 80):
        own = members(records[:number])[number % SIZE]
        assert (point(own) != point(records[number])).sum() == 1


def test_a_choice_on_which_two_agree_is_the_first_ones():
    space = Space(rule=Choice(*range(50)), x=Float(0, 1))
    searcher = DifferentialEvolution(population=4, crossover=1)
    # The first four have one rule, so no difference leads to another.
    records = run(searcher, space, lambda t: t["x"], 4)
    rules = [7, 7, 7, 7]
    told = [
        Observation(i, {"rule": rule, "x": r.settings["x"]}, "complete", (r.score,), notes=r.notes)
        for i, (rule, r) in enumerate(zip(rules, records))
    ]
    new = [searcher.suggest(History(told), space, np.random.default_rng(seed)).settings for seed in range(100)]
    assert {settings["rule"] for settings in new} == {7}
    told[1] = Observation(1, {**told[1].settings, "rule": 8}, "complete", told[1].losses, notes=told[1].notes)
    new = [searcher.suggest(History(told), space, np.random.default_rng(seed)).settings for seed in range(400)]
    # For place 0 one of b and c is the other rule in two cases of three, which draws any rule in half of them.
    assert np.mean([settings["rule"] not in (7, 8) for settings in new]) == pytest.approx(48 / 50 / 3, abs=0.08)


def test_it_converges():
    records = run(DifferentialEvolution(), SPACE, loss, 400)
    assert min(record.score for record in records) < 1e-5


def test_with_four_workers_too():
    records = run(DifferentialEvolution(), SPACE, loss, 400, workers=4)
    assert min(record.score for record in records) < 1e-5
