from __future__ import annotations

import pytest

from metahpo.errors import SearchError
from metahpo.searchers import (
    CMAES,
    TPE,
    DifferentialEvolution,
    Genetic,
    LocalSearch,
    RegularizedEvolution,
)

WRONG = [
    (LocalSearch, {"starts": 0}, "LocalSearch: starts should be a whole number of at least 1, found 0"),
    (LocalSearch, {"patience": 2.5}, "LocalSearch: patience should be a whole number of at least 1, found 2.5"),
    (LocalSearch, {"step": 0}, "LocalSearch: step should be a number above 0 and at most 1, found 0"),
    (LocalSearch, {"step": "wide"}, "LocalSearch: step should be a number above 0 and at most 1, found 'wide'"),
    (Genetic, {"population": True}, "Genetic: population should be a whole number of at least 2, found True"),
    (Genetic, {"crossover": 1.5}, "Genetic: crossover should be a number of at least 0 and at most 1, found 1.5"),
    (RegularizedEvolution, {"width": float("nan")}, "RegularizedEvolution: width should be a number above 0"),
    (DifferentialEvolution, {"population": 3}, "population should be a whole number of at least 4, found 3"),
    (DifferentialEvolution, {"strategy": "best"}, "should be one of rand/1/bin, best/1/bin, found 'best'"),
    (CMAES, {"population": 3}, "CMAES: population should be a whole number of at least 4, found 3"),
    (CMAES, {"population": -1}, "CMAES: population should be a whole number of at least 0, found -1"),
    (CMAES, {"sigma": 0}, "CMAES: sigma should be a number above 0 and at most 10, found 0"),
    (TPE, {"multivariate": "no"}, "TPE: multivariate should be True or False, found 'no'"),
    (TPE, {"candidates": 0}, "TPE: candidates should be a whole number of at least 1, found 0"),
]


@pytest.mark.parametrize("searcher, options, says", WRONG)
def test_a_wrong_option_is_named_with_what_it_should_be(searcher, options, says):
    with pytest.raises(SearchError) as raised:
        searcher(**options)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_ends_of_the_ranges_are_taken():
    Genetic(crossover=0, width=1, population=2, tournament=1, initial=1)
    DifferentialEvolution(crossover=1, weight=2, population=4)
    CMAES(population=0, initial=0, sigma=10)
