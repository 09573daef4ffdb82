"""Checks of a searcher's options, which become plain Python's own numbers."""

from __future__ import annotations

import math

from metahpo.checks import check_choice, check_flag, check_number, check_whole, plain
from metahpo.errors import SearchArgumentError
from metahpo.searchers.base import Searcher


def at_least(searcher: Searcher, **least: int) -> None:
    """Raises SearchArgumentError unless each of these options is a whole number of at least that."""
    for name, low in least.items():
        value = getattr(searcher, name)
        check_whole(searcher, name, value, at_least=low, error=SearchArgumentError)
        _keep(searcher, name, value)


def above(searcher: Searcher, **ranges: tuple[float, float]) -> None:
    """Raises SearchArgumentError unless each option is a number above the first, at most the second."""
    for name, (low, high) in ranges.items():
        value, most = getattr(searcher, name), None if math.isinf(high) else high
        check_number(searcher, name, value, above=low, at_most=most, error=SearchArgumentError)
        _keep(searcher, name, value)


def fraction(searcher: Searcher, *names: str) -> None:
    """Raises SearchArgumentError unless each of these options is a number from 0 to 1."""
    for name in names:
        value = getattr(searcher, name)
        check_number(searcher, name, value, at_least=0, at_most=1, error=SearchArgumentError)
        _keep(searcher, name, value)


def one_of(searcher: Searcher, **known: tuple[str, ...]) -> None:
    """Raises SearchArgumentError unless each of these options is one of those."""
    for name, options in known.items():
        check_choice(searcher, name, getattr(searcher, name), options, error=SearchArgumentError)


def flag(searcher: Searcher, *names: str) -> None:
    """Raises SearchArgumentError unless each of these options is True or False."""
    for name in names:
        value = getattr(searcher, name)
        _keep(searcher, name, check_flag(searcher, name, value, error=SearchArgumentError))


def _keep(searcher: Searcher, name: str, value: object) -> None:
    # A study knows its searcher by its text, in which NumPy's numbers would look different.
    object.__setattr__(searcher, name, plain(value))
