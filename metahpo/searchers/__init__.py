"""Classic searchers over the same training loop.

A name's module is imported when the name is asked for: a worker needs few of them, and some import for a second.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metahpo.searchers.asha import ASHA as ASHA
    from metahpo.searchers.base import History as History
    from metahpo.searchers.base import Observation as Observation
    from metahpo.searchers.base import Proposal as Proposal
    from metahpo.searchers.base import Searcher as Searcher
    from metahpo.searchers.bayesian import Bayesian as Bayesian
    from metahpo.searchers.bohb import BOHB as BOHB
    from metahpo.searchers.cma_es import CMAES as CMAES
    from metahpo.searchers.differential_evolution import DifferentialEvolution as DifferentialEvolution
    from metahpo.searchers.executors import Processes as Processes
    from metahpo.searchers.executors import Ray as Ray
    from metahpo.searchers.genetic import Genetic as Genetic
    from metahpo.searchers.gradient import Gradient as Gradient
    from metahpo.searchers.grid import Grid as Grid
    from metahpo.searchers.hyperband import Hyperband as Hyperband
    from metahpo.searchers.hypergradient_objective import HypergradientObjective as HypergradientObjective
    from metahpo.searchers.local_search import LocalSearch as LocalSearch
    from metahpo.searchers.outcome import Outcome as Outcome
    from metahpo.searchers.quasi_random import QuasiRandom as QuasiRandom
    from metahpo.searchers.random import Random as Random
    from metahpo.searchers.records import TrialRecord as TrialRecord
    from metahpo.searchers.regularized_evolution import RegularizedEvolution as RegularizedEvolution
    from metahpo.searchers.settings import Choice as Choice
    from metahpo.searchers.settings import Float as Float
    from metahpo.searchers.settings import Int as Int
    from metahpo.searchers.space import Space as Space
    from metahpo.searchers.study import Study as Study
    from metahpo.searchers.successive_halving import SuccessiveHalving as SuccessiveHalving
    from metahpo.searchers.tpe import TPE as TPE
    from metahpo.searchers.training_objective import TrainingObjective as TrainingObjective
    from metahpo.searchers.trial import Trial as Trial

_HOMES = {
    "ASHA": "asha",
    "History": "base",
    "Observation": "base",
    "Proposal": "base",
    "Searcher": "base",
    "Bayesian": "bayesian",
    "BOHB": "bohb",
    "CMAES": "cma_es",
    "DifferentialEvolution": "differential_evolution",
    "Processes": "executors",
    "Ray": "executors",
    "Genetic": "genetic",
    "Gradient": "gradient",
    "Grid": "grid",
    "Hyperband": "hyperband",
    "HypergradientObjective": "hypergradient_objective",
    "LocalSearch": "local_search",
    "Outcome": "outcome",
    "QuasiRandom": "quasi_random",
    "Random": "random",
    "TrialRecord": "records",
    "RegularizedEvolution": "regularized_evolution",
    "Choice": "settings",
    "Float": "settings",
    "Int": "settings",
    "Space": "space",
    "Study": "study",
    "SuccessiveHalving": "successive_halving",
    "TPE": "tpe",
    "TrainingObjective": "training_objective",
    "Trial": "trial",
}


__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
