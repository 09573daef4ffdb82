from __future__ import annotations

import numpy as np

from metahpo.searchers import Choice, Float, RegularizedEvolution, Space
from metahpo.testing.running import run

SPACE = Space({f"s{i}": Choice(*range(8)) for i in range(6)})


def loss(trial):
    # The first trials are the best by far, lest anything but their age end their time as parents.
    return trial.number / 100 if trial.number < 5 else 1 + sum(v * 8**i for i, v in enumerate(trial.settings.values()))


def changes(first, second):
    return sum(first.settings[name] != second.settings[name] for name in SPACE)


def test_the_parent_is_the_best_of_the_latest_trials():
    # So many are drawn that the best one is among them.
    records = run(RegularizedEvolution(population=5, sample=200), SPACE, loss, 60)
    for number in range(5, 60):
        latest = records[number - 5 : number]
        parent = min(latest, key=lambda r: r.score)
        assert changes(parent, records[number]) == 1
    # The first ones have died, although no other was as good.
    assert all(changes(records[0], record) > 1 for record in records[12:])


def test_with_a_sample_of_one_any_of_the_latest_is_the_parent():
    records = run(RegularizedEvolution(population=5, sample=1), SPACE, loss, 300)
    ages = []
    for number in range(5, 300):
        near = [n for n in range(number - 5, number) if changes(records[n], records[number]) == 1]
        assert near
        if len(near) == 1:
            ages.append(number - near[0])
    assert np.bincount(ages, minlength=6)[1:].min() > 20


def test_first_trials_are_those_of_random_search():
    records = run(RegularizedEvolution(population=7), SPACE, loss, 7)
    assert [r.settings for r in records] == [SPACE.sample(np.random.default_rng([0, n])) for n in range(7)]


def test_numbers_move_by_small_steps():
    space = Space(x=Float(0, 1), y=Float(0, 1))
    records = run(RegularizedEvolution(population=2, sample=50, width=0.01), space, lambda t: float(t.number), 40)
    # The older of the two is always the better one.
    for number in range(2, 40):
        old, new = records[number - 2].settings, records[number].settings
        moved = [abs(new[name] - old[name]) for name in space if new[name] != old[name]]
        assert len(moved) == 1 and moved[0] < 0.05
