from __future__ import annotations

import numpy as np
import pytest

from metahpo.searchers import Choice, Float, History, Int, LocalSearch, Observation, Space, Study
from metahpo.testing.problems import STEPPED, bowl
from metahpo.testing.running import run

WIDE = Space({f"s{i}": Choice(*range(6)) if i % 2 else Int(0, 5) for i in range(6)})


def climbs(records):
    return [record.notes["climb"] for record in records]


def test_each_trial_is_a_neighbour_of_the_best_of_its_climb():
    records = run(LocalSearch(starts=5, patience=60), WIDE, bowl(WIDE), 60)
    records = [record for record in records if record.notes["climb"] == 0]
    best = min(records[:5], key=lambda r: r.score)
    moves = 0
    for record in records[5:]:
        assert sum(record.settings[name] != best.settings[name] for name in WIDE) == 1
        if record.score < best.score:
            best, moves = record, moves + 1
    assert len(records) > 20 and moves > 3


def test_it_begins_again_after_so_many_failures_in_a_row():
    records = run(LocalSearch(starts=3, patience=4), WIDE, lambda trial: 1.0, 22)
    assert climbs(records) == [0] * 7 + [1] * 5 + [2] * 5 + [3] * 5


def test_a_success_ends_the_row_of_failures():
    losses = [5, 4, 4, 4, 3, 4, 4, 4, 4, 4]
    records = run(LocalSearch(starts=1, patience=4), WIDE, lambda trial: losses[trial.number], 10)
    assert climbs(records) == [0] * 9 + [1]


def test_nothing_is_tried_twice_and_the_search_ends_when_all_was():
    everything = list(STEPPED.grid())
    for workers in (1, 4):
        records = run(LocalSearch(starts=3), STEPPED, bowl(STEPPED), 1000, workers=workers)
        tried = [repr(record.settings) for record in records]
        assert len(tried) == len(set(tried)) == len(everything) and set(tried) == {repr(s) for s in everything}


def test_when_all_neighbours_were_tried_it_begins_elsewhere():
    space = Space(a=Choice(*range(12)), b=Choice(*range(12)))
    optimum = {"a": 3, "b": 4}
    records = run(LocalSearch(starts=1, patience=10**6), space, lambda t: float(t.settings != optimum), 100)

    def beside(first, second):
        return (first.settings["a"] == second.settings["a"]) != (first.settings["b"] == second.settings["b"])

    for climb in range(3):
        own = [record for record in records if record.notes["climb"] == climb]
        until = own[-1].number + 1
        # The 22 settings that differ from the start in one value, tried in this climb or before.
        assert sum(beside(own[0], record) for record in records[:until]) == 22 or optimum in [r.settings for r in own]


def test_steps_shrink_with_each_failure():
    space = Space(x=Float(0, 1))

    def spread(failures):
        losses = [0.0] + [1.0] * failures
        told = [Observation(i, {"x": 0.5}, "complete", (loss,)) for i, loss in enumerate(losses)]
        searcher = LocalSearch(starts=1, step=0.05)
        new = [searcher.suggest(History(told), space, np.random.default_rng(seed)) for seed in range(1500)]
        return np.std([proposal.settings["x"] for proposal in new])

    assert abs(spread(0) / 0.05 - 1) < 0.08
    assert abs(spread(10) / spread(0) - 0.9**10) < 0.04


def test_it_finds_the_bottom_of_a_bowl():
    records = run(LocalSearch(), WIDE, bowl(WIDE), 150)
    # The bowl is a sum over the settings, each of which has its own lowest value.
    lowest = sum(min((setting.unit(v) - 0.3) ** 2 for v in setting.values()) for setting in WIDE.settings.values())
    assert min(record.score for record in records) == pytest.approx(lowest)


def test_settings_of_the_users_own_are_climbed_from():
    study = Study(WIDE, LocalSearch(starts=2))
    for value in (0, 1):
        study.tell(study.ask(dict.fromkeys(WIDE, value)), float(value))
    new = study.ask().settings
    assert sum(value != 0 for value in new.values()) == 1
