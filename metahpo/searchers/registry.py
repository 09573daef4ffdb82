"""The searchers by the names that configs call them by."""

from __future__ import annotations

from metahpo.searchers.asha import ASHA
from metahpo.searchers.base import Searcher
from metahpo.searchers.bohb import BOHB
from metahpo.searchers.grid import Grid
from metahpo.searchers.hyperband import Hyperband
from metahpo.searchers.random import Random
from metahpo.searchers.successive_halving import SuccessiveHalving

SEARCHERS: dict[str, type[Searcher]] = {
    "grid": Grid,
    "random": Random,
    "successive_halving": SuccessiveHalving,
    "hyperband": Hyperband,
    "asha": ASHA,
    "bohb": BOHB,
}
