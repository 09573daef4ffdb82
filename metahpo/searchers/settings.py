"""What a search may set: numbers, whole numbers, choices."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, ClassVar

from typing_extensions import Self

from metahpo.checks import check_flag, plain
from metahpo.errors import SearchArgumentError, shown

# The setting exists only while each of these others has one of these values.
Condition = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """One thing that a search may set; ``when``: the values of others that it exists for.

    Every value has a place in the unit interval: ``at(u)`` is the value at 0 <= u <= 1, such that a uniform u draws
    from the setting's own distribution, and ``unit(value)`` is the middle of the values' share: ``at(unit(v)) == v``.
    """

    when: Condition = field(default_factory=dict, kw_only=True)
    # How YAML calls it.
    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not isinstance(self.when, Mapping):
            raise SearchArgumentError(f"{self.label}: when should map settings to values, found {shown(self.when)}")
        conditions = {}
        for name, values in self.when.items():
            where = f"{self.label}: when {name!r}"
            conditions[name] = tuple(_plain(values if isinstance(values, (list, tuple)) else [values], where))
            if not conditions[name]:
                raise SearchArgumentError(f"{where} should have at least one value")
        object.__setattr__(self, "when", conditions)

    @property
    def label(self) -> str:
        """Without the condition, for messages."""
        return repr(replace(self, when={}) if self.when else self)

    @property
    def count(self) -> float:
        """How many values there are; infinity for a continuous range."""
        raise NotImplementedError

    def at(self, u: float) -> Any:
        raise NotImplementedError

    def unit(self, value: Any) -> float:
        raise NotImplementedError

    def values(self) -> Sequence[Any]:
        """All values in order, each made when it is asked for: there may be millions of them.

        Raises:
            SearchError: For a continuous range.
        """
        if math.isinf(self.count):
            raise SearchArgumentError(f"{self.label} is a continuous range; a list of its values needs a step")
        return _Values(self)

    def check(self, value: Any) -> None:
        """Raises SearchError unless ``value`` is one of the setting's, in type too."""
        raise NotImplementedError

    def tree(self) -> dict[str, Any]:
        """The setting in plain values, as YAML writes it."""
        raise NotImplementedError

    def _with_condition(self, tree: dict[str, Any]) -> dict[str, Any]:
        if self.when:
            tree["when"] = {
                k: v[0] if len(v) == 1 and not isinstance(v[0], list) else list(v) for k, v in self.when.items()
            }
        return tree

    def _repr(self, *parts: str) -> str:
        condition = f"when={self._with_condition({})['when']!r}" if self.when else ""
        return f"{type(self).__name__}({', '.join(p for p in (*parts, condition) if p)})"


@dataclass(frozen=True, repr=False)
class _Range(Setting):
    low: Any
    high: Any
    log: bool = False
    step: Any = None

    def __post_init__(self) -> None:
        self._check_bounds()
        super().__post_init__()
        if self.low >= self.high:
            raise SearchArgumentError(f"{self.label}: low should be below high")
        object.__setattr__(self, "log", check_flag(self.label, "log", self.log, error=SearchArgumentError))
        if self.log and self.low <= 0:
            raise SearchArgumentError(f"{self.label}: a log range should begin above 0, found {self.low}")
        if self.step is not None and self.log:
            raise SearchArgumentError(f"{self.label}: a log range takes no step")
        if self.step is not None and not 0 < self.step <= self.high - self.low:
            raise SearchArgumentError(f"{self.label}: step should be above 0 and at most high - low, found {self.step}")
        if self.step is not None and (self.high - self.low) / self.step > 2**53:
            raise SearchArgumentError(f"{self.label}: step is too small for the range, found {self.step}")

    def _check_bounds(self) -> None:
        raise NotImplementedError

    def tree(self) -> dict[str, Any]:
        tree: dict[str, Any] = {self.kind: [self.low, self.high]}
        tree.update({"log": True} if self.log else {})
        tree.update({} if self.step is None else {"step": self.step})
        return self._with_condition(tree)

    def __repr__(self) -> str:
        step = "" if self.step is None else f"step={self.step!r}"
        return self._repr(repr(self.low), repr(self.high), "log=True" if self.log else "", step)


@dataclass(frozen=True, repr=False)
class Float(_Range):
    """A number from low to high, both included; log: by its logarithm; step: low, low + step, ... alone."""

    kind: ClassVar[str] = "float"

    def _check_bounds(self) -> None:
        for name in ("low", "high", "step"):
            value = getattr(self, name)
            if value is None and name == "step":
                continue
            value = plain(value)
            if not _real(value) or not _finite(value):
                raise SearchArgumentError(f"{self.label}: {name} should be a finite number, found {shown(value)}")
            object.__setattr__(self, name, float(value))
        if math.isinf(self.high - self.low):
            raise SearchArgumentError(f"{self.label}: high - low is too large for a number")

    @property
    def count(self) -> float:
        return math.inf if self.step is None else math.floor((self.high - self.low) / self.step + 1e-9) + 1

    def at(self, u: float) -> float:
        if self.step is not None:
            # In decimals, lest 3 steps of 0.1 be 0.30000000000000004.
            steps = _bin(u, self.count) * Decimal(repr(self.step))
            return min(float(Decimal(repr(self.low)) + steps), self.high)
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = low * (1 - u) + high * u
        return min(max(math.exp(value) if self.log else value, self.low), self.high)

    def unit(self, value: float) -> float:
        if self.step is not None:
            return (round((value - self.low) / self.step) + 0.5) / self.count
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def check(self, value: Any) -> None:
        value = plain(value)
        if not _real(value) or not self.low <= value <= self.high:
            raise SearchArgumentError(f"should be a number in [{self.low}, {self.high}], found {shown(value)}")
        if self.step is not None and abs(self.at(self.unit(value)) - value) > 1e-6 * self.step:
            raise SearchArgumentError(
                f"should be {self.low} and a number of steps of {self.step}, found {shown(value)}"
            )


@dataclass(frozen=True, repr=False)
class Int(_Range):
    """A whole number from low to high, both included; log: by its logarithm; step: low, low + step, ... alone."""

    kind: ClassVar[str] = "int"

    def _check_bounds(self) -> None:
        for name in ("low", "high", "step"):
            value = getattr(self, name)
            if value is None and name == "step":
                continue
            # Up to there databases and the unit interval have a place for each.
            value = plain(value)
            if not _real(value) or not isinstance(value, int) or abs(value) > 2**53:
                raise SearchArgumentError(
                    f"{self.label}: {name} should be a whole number within 2**53, found {shown(value)}"
                )
            object.__setattr__(self, name, value)

    @property
    def count(self) -> float:
        return (self.high - self.low) // (self.step or 1) + 1

    def at(self, u: float) -> int:
        if self.log:
            low, high = math.log(self.low - 0.5), math.log(self.high + 0.5)
            return min(max(round(math.exp(low * (1 - u) + high * u)), self.low), self.high)
        return self.low + _bin(u, self.count) * (self.step or 1)

    def unit(self, value: int) -> float:
        if self.log:
            return math.log(value / (self.low - 0.5)) / math.log((self.high + 0.5) / (self.low - 0.5))
        return ((value - self.low) // (self.step or 1) + 0.5) / self.count

    def values(self) -> Sequence[int]:
        return range(self.low, self.high + 1, self.step or 1)

    def check(self, value: Any) -> None:
        value = plain(value)
        if not _real(value) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise SearchArgumentError(f"should be a whole number in [{self.low}, {self.high}], found {shown(value)}")
        if (value - self.low) % (self.step or 1):
            raise SearchArgumentError(
                f"should be {self.low} and a number of steps of {self.step}, found {shown(value)}"
            )


@dataclass(frozen=True, repr=False, init=False)
class Choice(Setting):
    """One of the options, which have no order: plain values (text, numbers, true, null, or lists and dicts of them)."""

    options: tuple[Any, ...]
    kind: ClassVar[str] = "choice"

    def __init__(self, *options: Any, when: Mapping[str, Any] | None = None):
        object.__setattr__(self, "options", options)
        object.__setattr__(self, "when", {} if when is None else when)
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.options:
            raise SearchArgumentError("Choice(): should have at least one option")
        object.__setattr__(self, "options", tuple(_plain(self.options, f"{self.label}: options")))
        keys = [_key(option) for option in self.options]
        if twice := [o for i, o in enumerate(self.options) if keys[i] in keys[:i]]:
            raise SearchArgumentError(f"{self.label}: option {twice[0]!r} is given twice")

    @property
    def label(self) -> str:
        return f"Choice({', '.join(map(repr, self.options))})"

    @property
    def count(self) -> float:
        return len(self.options)

    def at(self, u: float) -> Any:
        return self.options[_bin(u, len(self.options))]

    def unit(self, value: Any) -> float:
        return (self.index(value) + 0.5) / len(self.options)

    def index(self, value: Any) -> int:
        """The option's place; 1, 1.0 and true are three options. Raises SearchError if there is no such option."""
        for place, option in enumerate(self.options):
            if _key(option) == _key(value):
                return place
        raise SearchArgumentError(f"should be one of {', '.join(map(repr, self.options))}, found {shown(value)}")

    def values(self) -> list[Any]:
        return list(self.options)

    def check(self, value: Any) -> None:
        self.index(value)

    def tree(self) -> dict[str, Any]:
        return self._with_condition({"choice": list(self.options)})

    def __repr__(self) -> str:
        return self._repr(*map(repr, self.options))

    @classmethod
    def of(cls, options: Any, **rest: Any) -> Self:
        if not isinstance(options, list):
            raise SearchArgumentError(f"choice should be a list of options, found {shown(options)}")
        return cls(*options, **rest)


def _real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # A whole number too large for a float.
        return False


class _Values(Sequence[Any]):
    """The values of a setting that has a number of them."""

    def __init__(self, setting: Setting):
        self._setting, self._places = setting, range(int(setting.count))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in self._places[index]]
        return self._setting.at((self._places[index] + 0.5) / len(self._places))


def _bin(u: float, count: float) -> int:
    """The share of the unit interval, cut into ``count`` equal ones, that u lies in."""
    return min(max(int(u * count), 0), int(count) - 1)


def _plain(value: Any, where: str) -> Any:
    """NumPy's numbers as Python's and tuples as lists, for YAML and JSON know no others.

    Raises:
        SearchArgumentError: For what these cannot write.
    """
    value = plain(value)
    if isinstance(value, (list, tuple)):
        return [_plain(one, where) for one in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(one, where) for key, one in value.items()}
    try:
        if not isinstance(value, Mapping):
            return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        pass
    raise SearchArgumentError(
        f"{where} should be plain (text, numbers, true, null, lists or sections of them), found {value!r}"
    )


def _key(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True)
    except TypeError:
        return repr(value)


def same(first: Any, second: Any) -> bool:
    """Whether two values are the same, in type too."""
    return _key(first) == _key(second)


KINDS: dict[str, type[Setting]] = {kind.kind: kind for kind in (Float, Int, Choice)}


def setting_of(tree: Any) -> Setting:
    """The setting that YAML describes: {float: [LOW, HIGH], log: true}, {int: [1, 9], step: 2}, {choice: [a, b]}."""
    if isinstance(tree, Setting):
        return tree
    named = [kind for kind in KINDS if isinstance(tree, Mapping) and kind in tree]
    if len(named) != 1:
        raise SearchArgumentError(
            f"should be {{float: [LOW, HIGH]}}, {{int: [LOW, HIGH]}} or {{choice: [...]}}, found {shown(tree)}"
        )
    kind, rest = named[0], {key: value for key, value in tree.items() if key != named[0]}
    known = ("when",) if kind == "choice" else ("log", "step", "when")
    if unknown := [key for key in rest if key not in known]:
        raise SearchArgumentError(f"a setting of kind {kind} has no key {unknown[0]!r}; known: {', '.join(known)}")
    if kind == "choice":
        return Choice.of(tree[kind], **rest)
    if not (isinstance(tree[kind], (list, tuple)) and len(tree[kind]) == 2):
        raise SearchArgumentError(f"{kind} should be [LOW, HIGH], found {shown(tree[kind])}")
    return KINDS[kind](*tree[kind], **rest)  # type: ignore[call-arg]
