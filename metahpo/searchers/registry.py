"""The searchers by the names that configs call them by."""

from __future__ import annotations

from metahpo.searchers.base import Searcher
from metahpo.searchers.grid import Grid
from metahpo.searchers.random import Random

SEARCHERS: dict[str, type[Searcher]] = {
    "grid": Grid,
    "random": Random,
}
