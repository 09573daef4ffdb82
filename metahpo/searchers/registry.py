"""The searchers by the names that configs call them by."""

from __future__ import annotations

from metahpo.searchers.asha import ASHA
from metahpo.searchers.base import Searcher
from metahpo.searchers.bayesian import Bayesian
from metahpo.searchers.bohb import BOHB
from metahpo.searchers.cma_es import CMAES
from metahpo.searchers.differential_evolution import DifferentialEvolution
from metahpo.searchers.genetic import Genetic
from metahpo.searchers.gradient import Gradient
from metahpo.searchers.grid import Grid
from metahpo.searchers.hyperband import Hyperband
from metahpo.searchers.local_search import LocalSearch
from metahpo.searchers.quasi_random import QuasiRandom
from metahpo.searchers.random import Random
from metahpo.searchers.regularized_evolution import RegularizedEvolution
from metahpo.searchers.successive_halving import SuccessiveHalving
from metahpo.searchers.tpe import TPE

SEARCHERS: dict[str, type[Searcher]] = {
    "grid": Grid,
    "random": Random,
    "quasi_random": QuasiRandom,
    "local_search": LocalSearch,
    "genetic": Genetic,
    "regularized_evolution": RegularizedEvolution,
    "differential_evolution": DifferentialEvolution,
    "cma_es": CMAES,
    "tpe": TPE,
    "bayesian": Bayesian,
    "gradient": Gradient,
    "successive_halving": SuccessiveHalving,
    "hyperband": Hyperband,
    "asha": ASHA,
    "bohb": BOHB,
}
