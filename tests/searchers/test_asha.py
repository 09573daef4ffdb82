from __future__ import annotations

import heapq
import math

import numpy as np
import pytest

from metahpo.searchers import ASHA, Float, History, Observation, Space, Study

SPACE = Space(x=Float(0, 1), y=Float(0, 1))


def loss(settings, budget):
    if settings["y"] > 0.9:
        return math.nan
    return abs(settings["x"] - 0.3) + settings["y"] / budget


def observations(*rungs):
    """A dict a rung: parent's place below to loss (None: pending, "failed")."""
    found: list[Observation] = []
    first_below = 0
    for rung, losses in enumerate(rungs):
        first = len(found)
        for place, value in losses.items():
            state = {None: "pending", "failed": "failed"}.get(value, "complete")
            parent = first_below + place if rung else None
            settings = found[parent].settings if rung else {"x": place / 100, "y": 0.0}
            scores = (value,) if state == "complete" else None
            found.append(Observation(len(found), settings, state, scores, 3**rung, parent, {"rung": rung}))
        first_below = first
    return found


def suggest(history):
    return ASHA(1, 9, 3).suggest(History(history), SPACE, np.random.default_rng(0))


def test_two_that_ended_promote_none_and_three_promote_the_best():
    assert suggest(observations({0: 0.3, 1: 0.2})).parent is None
    proposal = suggest(observations({0: 0.3, 1: 0.2, 2: 0.4}))
    assert (proposal.parent, proposal.budget, proposal.settings) == (1, 3, {"x": 0.01, "y": 0.0})
    assert proposal.notes == {"rung": 1}


def test_it_goes_on_although_others_on_the_rung_are_at_work():
    assert suggest(observations({0: 0.3, 1: None, 2: 0.2, 3: 0.4, 4: None})).parent == 2


def test_nothing_is_promoted_twice():
    rung = {0: 0.3, 1: 0.2, 2: 0.4}
    for state in (None, "failed", 0.1):
        new = suggest(observations(rung, {1: state}))
        assert (new.parent, new.budget) == (None, 1)
    assert suggest(observations({**rung, 3: 0.1, 4: 0.5, 5: 0.6}, {1: 0.2})).parent == 3


def test_highest_rung_comes_first():
    low = {i: 0.1 * i for i in range(9)}
    proposal = suggest(observations(low, {0: 0.3, 1: 0.1, 2: 0.2}))
    assert (proposal.parent, proposal.budget) == (10, 9)
    assert suggest(observations(low, {0: 0.3, 1: 0.1})).parent == 2


def test_failed_ones_count_as_the_worst_and_never_go_on():
    assert suggest(observations({0: 0.3, 1: "failed", 2: "failed"})).parent == 0
    assert suggest(observations({0: "failed", 1: "failed", 2: "failed"})).parent is None
    six = {i: "failed" for i in range(5)}
    assert suggest(observations({**six, 5: 0.1}, {5: 0.1})).parent is None


def simulated(seed, workers, trials):
    """Algorithm 2 of the paper with workers that need as long as the training they add."""
    busy, now, started, rungs, promoted = [], 0.0, [], [[], [], [], []], set()
    for number in range(trials):
        if len(busy) == workers:
            now, ended, rung = heapq.heappop(busy)
            settings, budget, _ = started[ended]
            rungs[rung].append((loss(settings, budget), ended))
        for rung in (2, 1, 0):
            # NaN is worse than any number.
            order = sorted(rungs[rung], key=lambda t: (math.inf if math.isnan(t[0]) else t[0], t[1]))
            top = [n for value, n in order[: len(order) // 3] if not math.isnan(value)]
            ready = [n for n in top if n not in promoted]
            if ready:
                promoted.add(ready[0])
                started.append((started[ready[0]][0], 3 ** (rung + 1), ready[0]))
                heapq.heappush(busy, (now + 3 ** (rung + 1) - 3**rung, number, rung + 1))
                break
        else:
            started.append((SPACE.sample(np.random.default_rng([seed, number])), 1, None))
            heapq.heappush(busy, (now + 1, number, 0))
    return started


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_any_number_of_workers_does_what_the_paper_writes(workers):
    study = Study(SPACE, ASHA(1, 27, 3), parallel=workers, seed=6)
    study.optimize(lambda trial: loss(trial.settings, trial.budget), trials=200, max_failures=200)
    assert [(r.settings, r.budget, r.parent) for r in study.trials] == simulated(6, workers, 200)
    assert {r.budget for r in study.trials} == {1, 3, 9, 27}
    assert any(r.state == "failed" for r in study.trials)
