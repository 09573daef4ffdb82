"""Checks of what a caller passes: each gives the value back as plain Python, or raises one line.

They take NumPy's numbers and 0-d arrays or tensors wherever a number is taken, and no bool, NaN or
text for one. They load neither NumPy nor torch, so every room may use them.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from metahpo.errors import ArgumentError, did_you_mean, shown


def check_whole(
    owner: object,
    name: str,
    value: Any,
    *,
    at_least: int | None = None,
    at_most: int | None = None,
    error: type[ArgumentError] = ArgumentError,
) -> int:
    """The value as an int.

    Args:
        owner: Whose argument it is: an object or class, which gives its name, or text.
        name: The argument.
        value: What was passed.
        at_least: The smallest value allowed, or None.
        at_most: The largest value allowed, or None.
        error: The class to raise.

    Raises:
        ArgumentError: Of the class ``error``, unless the value is a whole number within those bounds.
    """
    number = plain(value)
    whole = isinstance(number, numbers.Integral) and not isinstance(number, bool)
    if not whole or not _within(number, at_least, None, at_most, None):
        refuse(owner, name, value, f"a whole number{_bounds(at_least, None, at_most, None)}", error)
    return int(number)


def check_number(
    owner: object,
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    infinite: bool = False,
    error: type[ArgumentError] = ArgumentError,
) -> float:
    """The value as a float.

    Args:
        owner: Whose argument it is: an object or class, which gives its name, or text.
        name: The argument.
        value: What was passed.
        at_least: The smallest value allowed, or None.
        above: A bound that the value must exceed, or None.
        at_most: The largest value allowed, or None.
        below: A bound that the value must not reach, or None.
        infinite: Whether infinity within those bounds is allowed.
        error: The class to raise.

    Raises:
        ArgumentError: Of the class ``error``, unless the value is a number within those bounds.
    """
    number = plain(value)
    real = isinstance(number, numbers.Real) and not isinstance(number, bool)
    try:
        number = float(number) if real else math.nan
    except OverflowError:
        number = math.inf
    usable = math.isfinite(number) or (math.isinf(number) and infinite)
    if not usable or not _within(number, at_least, above, at_most, below):
        bounds = _bounds(at_least, above, at_most, below)
        kind = "number" if infinite or bounds else "finite number"
        refuse(owner, name, value, f"a {kind}{bounds}", error)
    return number


def check_choice(
    owner: object,
    name: str,
    value: Any,
    known: Iterable[Any],
    *,
    error: type[ArgumentError] = ArgumentError,
) -> Any:
    """The value, one of those known.

    Raises:
        ArgumentError: Of the class ``error``, for any other value.
    """
    known = list(known)
    for choice in known:
        # True equals 1, and an array equals nothing in one word.
        if type(value) is type(choice) and value == choice:
            return value
    names = [choice for choice in known if isinstance(choice, str)]
    hint = f"; {did_you_mean(value, names)}" if isinstance(value, str) and len(names) > 4 else ""
    refuse(owner, name, value, f"one of {', '.join(map(str, known))}{hint}", error)


def check_flag(
    owner: object, name: str, value: Any, *, error: type[ArgumentError] = ArgumentError
) -> bool:
    """The value, True or False.

    Raises:
        ArgumentError: Of the class ``error``, for any other value, 0 and 1 and text among them.
    """
    flag = plain(value)
    if not isinstance(flag, bool):
        refuse(owner, name, value, "True or False", error)
    return flag


def check_type(
    owner: object,
    name: str,
    value: Any,
    kinds: type | tuple[type, ...],
    expected: str | None = None,
    *,
    error: type[ArgumentError] = ArgumentError,
) -> Any:
    """The value, an instance of one of those classes; ``expected`` puts them into words.

    Raises:
        ArgumentError: Of the class ``error``, for any other value.
    """
    if not isinstance(value, kinds):
        names = " or ".join(
            kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,))
        )
        refuse(owner, name, value, expected or f"of type {names}", error)
    return value


def check_callable(
    owner: object,
    name: str,
    value: Any,
    expected: str = "a function",
    *,
    error: type[ArgumentError] = ArgumentError,
) -> Any:
    """The value, something that can be called; ``expected`` says with what.

    Raises:
        ArgumentError: Of the class ``error``, for any other value.
    """
    if not callable(value):
        refuse(owner, name, value, expected, error)
    return value


def check_keywords(
    owner: type | Callable[..., Any], given: Iterable[str], error: type[ArgumentError] = ArgumentError
) -> None:
    """Looks for keywords that a class or function does not take, through ``**options`` to its bases.

    Raises:
        ArgumentError: Of the class ``error``, with the nearest keyword there is.
    """
    known: dict[str, None] = {}
    makers = [vars(kind).get("__init__") for kind in owner.__mro__] if isinstance(owner, type) else [owner]
    for maker in filter(inspect.isfunction, makers):
        parameters = inspect.signature(maker).parameters.values()
        known |= dict.fromkeys(p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
        if not maker.__module__.startswith("metahpo."):  # Where its options go, it alone knows.
            return
    else:
        return
    known.pop("self", None)
    for name in given:
        if name not in known:
            raise error(f"{owner.__name__}: has no argument {name!r}; {did_you_mean(name, known)}")


class KnownKeywords:
    """A base of classes that refuse, when made, a keyword that they do not take."""

    keyword_error: type[ArgumentError] = ArgumentError

    def __new__(cls, *args: Any, **options: Any) -> Any:
        check_keywords(cls, options, cls.keyword_error)
        return super().__new__(cls)


def plain(value: Any) -> Any:
    """A NumPy number, 0-d array or 0-d tensor as Python's own; any other value as it is."""
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        try:
            return value.item()
        except RuntimeError:  # A tensor without a value: under vmap, on meta.
            return value
    return value


def refuse(
    owner: object, name: str, value: Any, expected: str, error: type[ArgumentError] = ArgumentError
) -> NoReturn:
    """Raises ``error`` with the one line that says whose argument it is, what was found and what was expected."""
    whose = (
        owner
        if isinstance(owner, str)
        else (owner if isinstance(owner, type) else type(owner)).__name__
    )
    raise error(f"{whose}: {name} should be {expected}, found {shown(value)}")


def _within(
    number: float,
    at_least: float | None,
    above: float | None,
    at_most: float | None,
    below: float | None,
) -> bool:
    return not (
        (at_least is not None and not number >= at_least)
        or (above is not None and not number > above)
        or (at_most is not None and not number <= at_most)
        or (below is not None and not number < below)
    )


def _bounds(
    at_least: float | None, above: float | None, at_most: float | None, below: float | None
) -> str:
    low = (
        f" of at least {at_least}"
        if at_least is not None
        else f" above {above}"
        if above is not None
        else ""
    )
    high = (
        f" at most {at_most}"
        if at_most is not None
        else f" below {below}"
        if below is not None
        else ""
    )
    return f"{low} and{high}" if low and high else f"{low or ' of'}{high}" if high else low
