"""A space of settings: what a search may set, by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from metahpo.checks import check_type, check_whole, plain, refuse
from metahpo.errors import SearchArgumentError, SearchError, did_you_mean, shown
from metahpo.searchers.settings import Float, Setting, same, setting_of

Settings = dict[str, Any]
ARGUMENT: Any = {"error": SearchArgumentError}


class Space:
    """Settings by name: ``Space(lr=Float(1e-3, 1, log=True))`` or, by dotted keys, ``Space({"a.b": Int(1, 9)})``.

    A setting with ``when={"rule": "sgd"}`` exists only where ``rule`` is "sgd" (a list: one of these). Equal spaces
    have the same settings in the same order; ``Space.of(space.tree()) == space``, and so is what ``repr`` gives.
    Raises SearchError, which names the setting.
    """

    def __init__(self, settings: Mapping[str, Setting] | None = None, /, **named: Setting):
        if not isinstance(settings, (Mapping, type(None))):
            raise SearchArgumentError(f"space: should map names to settings, found {shown(settings)}")
        self.settings: dict[str, Setting] = {**(settings or {}), **named}
        if not self.settings:
            raise SearchArgumentError(
                "space: has no setting; expected at least one, such as inner_lr=Float(1e-3, 1, log=True)"
            )
        for name, setting in self.settings.items():
            if not isinstance(name, str) or not name:
                raise SearchArgumentError(f"space: a setting's name should be text, found {shown(name)}")
            if not isinstance(setting, Setting):
                raise SearchArgumentError(
                    f"space.{name}: should be a Float, an Int or a Choice, found {shown(setting)}"
                )
        self._check_conditions()

    @classmethod
    def of(cls, tree: Any) -> Space:
        """The space that plain values describe, as YAML gives them; see ``setting_of``. All errors at once."""
        if not isinstance(tree, Mapping):
            raise SearchArgumentError(f"space: should be a section of settings, found {shown(tree)}")
        settings, lines = {}, []
        for name, setting in tree.items():
            try:
                settings[name] = setting_of(setting)
            except SearchError as error:
                lines.append(f"space.{name}: {error}")
        if lines:
            raise SearchArgumentError("\n".join(lines))
        return cls(settings)

    def tree(self) -> dict[str, Any]:
        """The space in plain values, for YAML or JSON."""
        return {name: setting.tree() for name, setting in self.settings.items()}

    def __repr__(self) -> str:
        return f"Space({self.settings!r})"

    def __eq__(self, other: object) -> bool:
        # By their text, for True == 1 == 1.0.
        return isinstance(other, Space) and repr(self) == repr(other)

    def __iter__(self) -> Iterator[str]:
        return iter(self.settings)

    def __len__(self) -> int:
        return len(self.settings)

    def __getitem__(self, name: str) -> Setting:
        return self.settings[name]

    # Settings of one trial.

    def active(self, settings: Mapping[str, Any]) -> list[str]:
        """The names that exist given the others' values, in the space's order."""
        there: dict[str, bool] = {}
        for name in self._order:
            there[name] = all(
                there[other] and other in settings and any(same(settings[other], v) for v in values)
                for other, values in self.settings[name].when.items()
            )
        return [name for name in self.settings if there[name]]

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises SearchError unless ``settings`` has a value of the right type and range for each that exists."""
        if unknown := [name for name in settings if name not in self.settings]:
            raise SearchArgumentError(
                f"no setting {unknown[0]!r} in the space; {did_you_mean(str(unknown[0]), self.settings)}"
            )
        active = self.active(settings)
        for name in self.settings:
            if name in active and name not in settings:
                raise SearchArgumentError(f"setting {name!r} is missing")
            if name not in active and name in settings:
                raise SearchArgumentError(
                    f"setting {name!r} should not be there: it exists when {self.settings[name].when}"
                )
        for name in active:
            try:
                self.settings[name].check(settings[name])
            except SearchError as error:
                raise SearchArgumentError(f"setting {name!r} {error}") from None

    def plain(self, settings: Mapping[str, Any]) -> Settings:
        """Settings of one trial in Python's own numbers, checked; see ``check``."""
        check_type("space", "settings of a trial", settings, Mapping, "a mapping of names to values", **ARGUMENT)
        found = {name: plain(value) for name, value in settings.items()}
        self.check(found)
        return found

    def parents_first(self) -> list[str]:
        """The names, those that others depend on before these."""
        return list(self._order)

    def decode(self, units: np.ndarray) -> Settings:
        """The settings at a point [D] of the unit cube, a coordinate each; those that do not exist are left out."""
        if getattr(units, "shape", (len(units),)) != (len(self),):
            refuse("space.decode", "units", units, f"a number for each of {len(self)} settings", SearchArgumentError)
        settings = {name: setting.at(float(u)) for (name, setting), u in zip(self.settings.items(), units)}
        return {name: settings[name] for name in self.active(settings)}

    def encode(self, settings: Mapping[str, Any], missing: float = 0.5) -> np.ndarray:
        """The point [D] of the unit cube; ``missing`` for a setting that does not exist."""
        return np.array(
            [setting.unit(settings[n]) if n in settings else missing for n, setting in self.settings.items()]
        )

    def sample(self, rng: np.random.Generator) -> Settings:
        """Settings at random, each from its own distribution."""
        check_type("space.sample", "rng", rng, np.random.Generator, "a numpy.random.Generator", **ARGUMENT)
        return self.decode(rng.random(len(self)))

    def grid(self, start: int = 0) -> Iterator[Settings]:
        """All settings there are from the start-th on, the last one's values changing fastest.

        Raises SearchError, which names it, for a continuous range without a step.
        """
        start = check_whole("space.grid", "start", start, at_least=0, **ARGUMENT)
        for name, setting in self.settings.items():
            if math.isinf(setting.count):
                raise SearchArgumentError(f"space.{name}: {setting.label} is a continuous range; a grid needs its step")
        return self._grid({}, 0, start)

    def _grid(self, chosen: Settings, place: int, skip: int) -> Iterator[Settings]:
        if place == len(self._order):
            yield {name: chosen[name] for name in self.settings if name in chosen}
            return
        for further in self._choices(chosen, place):
            if skip and (size := self._size(further, place + 1, skip + 1)) <= skip:
                skip -= size
                continue
            yield from self._grid(further, place + 1, skip)
            skip = 0

    def _choices(self, chosen: Settings, place: int) -> Iterator[Settings]:
        """``chosen`` with each value of the setting at this place of the order; as it is if there is none."""
        name = self._order[place]
        if not self._exists(name, chosen):
            yield chosen
            return
        for value in self.settings[name].values():
            yield {**chosen, name: value}

    def _size(self, chosen: Settings, place: int, enough: int) -> int:
        """How many ways there are to go on from ``chosen``, counted no further than ``enough``."""
        if place == len(self._order):
            return 1
        name = self._order[place]
        if any(name in setting.when for setting in self.settings.values()):
            size = 0
            for further in self._choices(chosen, place):
                size += self._size(further, place + 1, enough)
                if size >= enough:
                    break
            return size
        count = int(self.settings[name].count) if self._exists(name, chosen) else 1
        return count * self._size(chosen, place + 1, enough)

    def _exists(self, name: str, chosen: Settings) -> bool:
        """Whether it does given those that come before it in the order."""
        return all(
            other in chosen and any(same(chosen[other], v) for v in values)
            for other, values in self.settings[name].when.items()
        )

    # Conditions.

    def _check_conditions(self) -> None:
        for name, setting in self.settings.items():
            for other, values in setting.when.items():
                if other not in self.settings:
                    raise SearchArgumentError(
                        f"space.{name}: when names {other!r}, {did_you_mean(str(other), self.settings)}"
                    )
                if isinstance(self.settings[other], Float):
                    raise SearchArgumentError(f"space.{name}: when names {other!r}, which should be a Choice or an Int")
                for value in values:
                    try:
                        self.settings[other].check(value)
                    except SearchError as error:
                        raise SearchArgumentError(f"space.{name}: when {other!r} {error}") from None
        # Those that others depend on come first.
        self._order: list[str] = []
        while left := [name for name in self.settings if name not in self._order]:
            ready = [name for name in left if all(other in self._order for other in self.settings[name].when)]
            if not ready:
                raise SearchArgumentError(f"space.{left[0]}: when goes round in a circle")
            self._order.append(ready[0])


def key(settings: Mapping[str, Any]) -> str:
    """The same text for the same settings, in value and type, whatever their order."""
    return repr(sorted(settings.items()))
