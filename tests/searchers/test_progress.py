"""What the searchers that learn from losses are for: lower ones than random search finds in as many trials."""

from __future__ import annotations

import math

import numpy as np
import pytest

from metahpo.searchers import Choice, Float, Int, Random, Space
from metahpo.searchers.registry import SEARCHERS
from metahpo.testing.running import run

SPACE = Space(
    rate=Float(1e-5, 1, log=True),
    decay=Float(0, 1),
    width=Int(4, 256, log=True),
    layers=Int(1, 8),
    rule=Choice("sgd", "adam", "rms", "lion"),
    beta=Float(0, 1, when={"rule": ["adam", "lion"]}),
)
TRIALS, SEEDS = 70, 6


def loss(trial):
    s = trial.settings
    numbers = ((math.log10(s["rate"]) + 2) / 5, s["decay"] - 0.2, math.log(s["width"] / 64) / math.log(64))
    return (
        sum(number**2 for number in numbers)
        + ((s["layers"] - 3) / 8) ** 2
        + {"sgd": 0.3, "rms": 0.2, "lion": 0.1, "adam": 0.0}[s["rule"]]
        + (s.get("beta", 0.5) - 0.9) ** 2
    )


def lowest(searcher):
    """The geometric mean over the seeds of the lowest loss, of which 0 is the least there is."""
    found = [min(record.score for record in run(searcher, SPACE, loss, TRIALS, seed=seed)) for seed in range(SEEDS)]
    return np.exp(np.mean(np.log(found)))


@pytest.fixture(scope="module")
def by_chance():
    return lowest(Random())


LEARNING = ["local_search", "genetic", "regularized_evolution", "differential_evolution", "cma_es", "tpe"]


@pytest.mark.parametrize("name", LEARNING)
def test_is_better_than_random_search_by_a_clear_margin(name, by_chance):
    assert lowest(SEARCHERS[name]()) < 0.6 * by_chance
