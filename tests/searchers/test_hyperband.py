from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from metahpo.searchers import Choice, Float, Hyperband, Space, Study

SPACE = Space(x=Float(0, 1), lr=Float(1e-3, 1, log=True), kind=Choice("a", "b"))


def loss(settings, budget):
    """What is best after a little training is not best in the end."""
    if settings["lr"] > 0.5:
        return math.nan
    return abs(settings["x"] - 0.3) + 0.2 * np.cos(40 * settings["x"]) / math.sqrt(budget) + settings["lr"]


def test_brackets_are_those_of_the_paper():
    """Li et al. 2018, table 1: R = 81, eta = 3."""
    table = {
        4: [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)],
        3: [(34, 3), (11, 9), (3, 27), (1, 81)],
        2: [(15, 9), (5, 27), (1, 81)],
        1: [(8, 27), (2, 81)],
        0: [(5, 81)],
    }
    brackets = Hyperband(1, 81, 3).brackets()
    assert {4 - i: list(zip(*bracket)) for i, bracket in enumerate(brackets)} == table


@pytest.mark.parametrize(("least", "most", "eta"), [(1, 81, 3), (1, 64, 2), (0.5, 100, 4), (2, 50, 2.5), (1, 1000, 10)])
def test_all_brackets_cost_about_the_same(least, most, eta):
    searcher = Hyperband(least, most, eta)
    costs = [sum(n * r for n, r in zip(*bracket)) for bracket in searcher.brackets()]
    whole = len(searcher.budgets) * most
    assert len(costs) == math.floor(math.log(most / least) / math.log(eta) + 1e-9) + 1
    # Rounding up the number of settings adds at most one to each rung.
    assert all(0.5 * whole < cost <= whole + sum(searcher.budgets) + most for cost in costs)


def straightforward(least, most, eta, seed, trials):
    """Hyperband as the paper writes it, without workers, histories or notes: settings, budgets and parents."""
    done: list[tuple[dict, float, int | None]] = []

    def run(settings, budget, parent):
        done.append((settings, budget, parent))
        return loss(settings, budget)

    deepest = math.floor(math.log(most / least, eta) + 1e-9)
    while len(done) < trials:
        for s in range(deepest, -1, -1):
            n, r = math.ceil((deepest + 1) / (s + 1) * eta**s), most / eta**s
            there: list[tuple[dict, int]] = []
            for _ in range(n):
                settings = SPACE.sample(np.random.default_rng([seed, len(done)]))
                value = run(settings, r, None)
                there.append((value, len(done) - 1, settings))
            for i in range(1, s + 1):
                keep = sorted((t for t in there if not math.isnan(t[0])), key=lambda t: t[:2])[: n // eta**i]
                there = [(run(t[2], r * eta**i, t[1]), len(done) - 1, t[2]) for t in keep]
    return done[:trials]


@pytest.mark.parametrize(("least", "most", "eta"), [(1, 27, 3), (1, 16, 2), (5, 80, 4)])
def test_one_worker_does_what_the_paper_writes(least, most, eta):
    study = Study(SPACE, Hyperband(least, most, eta), seed=7)
    study.optimize(lambda trial: loss(trial.settings, trial.budget), trials=150, max_failures=150)
    found = [(r.settings, r.budget, r.parent) for r in study.trials]
    assert found == straightforward(least, most, eta, 7, 150)
    assert any(r.state == "failed" for r in study.trials)


@pytest.mark.parametrize("parallel", [2, 5, 16])
def test_workers_change_when_brackets_begin_and_not_what_is_promoted_within(parallel):
    searcher = Hyperband(1, 27, 3)
    study = Study(SPACE, searcher, parallel=parallel, seed=7)
    study.optimize(lambda trial: loss(trial.settings, trial.budget), trials=160, max_failures=150)
    plan = searcher.brackets()
    over = 0
    for number in range(study.trials[-1].notes["bracket"]):
        sizes, budgets = plan[number % len(plan)]
        own = [r for r in study.trials if r.notes["bracket"] == number]
        rungs = [[r for r in own if r.notes["rung"] == i] for i in range(len(sizes))]
        if len(rungs[-1]) < 1:
            continue
        over += 1
        assert len(rungs[0]) == sizes[0]
        for i, (below, above) in enumerate(pairwise(rungs), 1):
            best = sorted((r for r in below if r.scores), key=lambda r: (r.score, r.number))[: sizes[i]]
            assert [r.parent for r in above] == [r.number for r in best]
            assert {r.budget for r in above} == {budgets[i]}
            # The rung below was over, by the clock, before the first of them began.
            assert min(r.clock[0] for r in above) >= max(r.clock[1] for r in below)
    assert over >= 4


def test_no_worker_is_idle():
    study = Study(SPACE, Hyperband(1, 27, 3), parallel=4, seed=2)
    study.optimize(lambda trial: loss(trial.settings, trial.budget), budget=1500, max_failures=150)
    end = max(r.clock[0] for r in study.trials)
    work = sum(min(r.clock[1], end) - r.clock[0] for r in study.trials)
    assert work == pytest.approx(4 * end)
