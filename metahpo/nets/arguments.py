"""Checks that the nets share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from metahpo.checks import KnownKeywords, check_whole, refuse
from metahpo.errors import NetArgumentError


class NamedSizes(KnownKeywords):
    """A net that refuses a keyword it does not take."""

    keyword_error = NetArgumentError


def check_size(net: object, name: str, value: Any, at_least: int = 1) -> int:
    """The number as an int; raises NetArgumentError unless it is a whole one of at least that."""
    return check_whole(net, name, value, at_least=at_least, error=NetArgumentError)


def check_shape(net: object, name: str, value: Any, length: int | None = None) -> tuple[int, ...]:
    """The sizes as ints; raises NetArgumentError unless they are whole numbers, ``length`` of them."""
    expected = "(C, H, W)" if length == 3 else "a sequence of sizes"
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        refuse(net, name, value, expected, NetArgumentError)
    sizes = tuple(check_size(net, name, size) for size in value)
    if length is not None and len(sizes) != length:
        refuse(net, name, value, expected, NetArgumentError)
    return sizes
