from __future__ import annotations

import pytest

from metahpo.searchers.registry import SEARCHERS
from metahpo.testing import check_searcher

# So that short searches get beyond the first trials, which are random in most.
QUICK = {
    "local_search": {"starts": 3, "patience": 3},
    "genetic": {"initial": 3, "population": 4},
    "regularized_evolution": {"population": 4, "sample": 2},
    "differential_evolution": {"population": 4},
    "cma_es": {"initial": 2, "population": 4},
    "tpe": {"initial": 3},
    "bayesian": {"initial": 2},
    "successive_halving": {"max_budget": 9},
    "hyperband": {"max_budget": 9},
    "asha": {"max_budget": 9},
    "bohb": {"max_budget": 9},
}
# Of those that take their time.
TRIALS = {"bayesian": 4, "tpe": 8, "gradient": 8}


@pytest.mark.parametrize("name", SEARCHERS)
def test_searcher_conforms(name):
    searcher = SEARCHERS[name](**QUICK.get(name, {}))
    check_searcher(searcher, trials=TRIALS.get(name, 16), deterministic=name == "grid")
