"""Checks of a searcher's options."""

from __future__ import annotations

from metahpo.errors import SearchError
from metahpo.searchers.base import Searcher


def at_least(searcher: Searcher, **least: int) -> None:
    """Raises SearchError unless each of these options is a whole number of at least that."""
    for name, low in least.items():
        found = getattr(searcher, name)
        if isinstance(found, bool) or not isinstance(found, int) or found < low:
            raise SearchError(_told(searcher, name, f"a whole number of at least {low}"))


def above(searcher: Searcher, **ranges: tuple[float, float]) -> None:
    """Raises SearchError unless each of these options is a number above the first and at most the second."""
    for name, (low, high) in ranges.items():
        found = getattr(searcher, name)
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not low < found <= high:
            raise SearchError(_told(searcher, name, f"a number above {low} and at most {high}"))


def fraction(searcher: Searcher, *names: str) -> None:
    """Raises SearchError unless each of these options is a number from 0 to 1."""
    for name in names:
        found = getattr(searcher, name)
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 <= found <= 1:
            raise SearchError(_told(searcher, name, "a number from 0 to 1"))


def one_of(searcher: Searcher, **known: tuple[str, ...]) -> None:
    """Raises SearchError unless each of these options is one of those."""
    for name, options in known.items():
        if getattr(searcher, name) not in options:
            raise SearchError(_told(searcher, name, f"one of {', '.join(options)}"))


def _told(searcher: Searcher, name: str, expected: str) -> str:
    return f"{type(searcher).__name__}: {name} should be {expected}, found {getattr(searcher, name)!r}"
