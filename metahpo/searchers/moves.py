"""Settings made from others: what the searchers by small changes share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import numpy as np

from metahpo.searchers.base import History
from metahpo.searchers.settings import Choice, Int
from metahpo.searchers.space import Settings, Space, key

# Draws before a searcher takes it that nothing new is left where it looks.
DRAWS = 30


def completed(space: Space, values: Mapping[str, Any], rng: np.random.Generator) -> Settings:
    """Those of the values that exist together, and one at random for each other setting that exists then."""
    values = {name: setting.at(rng.random()) for name, setting in space.settings.items()} | dict(values)
    return {name: values[name] for name in space.active(values)}


def changeable(space: Space, settings: Settings) -> list[str]:
    """The names of those that have another value to change to."""
    return [name for name in settings if space[name].count > 1]


def changed(space: Space, settings: Settings, name: str, rng: np.random.Generator, width: float) -> Settings:
    """The same with one setting at another value, and with what exists because of that.

    A choice gets any other option. A number moves by a normal step of ``width`` times its range (its logarithm's, for a
    log one), reflected at the ends; a stepped one at least to the next value.
    """
    setting, value = space[name], settings[name]
    if isinstance(setting, Choice):
        others = [i for i in range(len(setting.options)) if i != setting.index(value)]
        new = setting.options[others[rng.integers(len(others))]]
    else:
        step = rng.normal() * width
        unit = setting.unit(value)
        new = setting.at(reflected(unit + step))
        if new == value and math.isfinite(setting.count):
            new = beside(space, settings, name, 1 if step > 0 else -1)[0]
    return completed(space, {**settings, name: new}, rng)


def beside(space: Space, settings: Settings, name: str, first: int = 1) -> list[Any]:
    """A choice's other options, or a stepped number's next value each way, the one towards ``first`` first."""
    setting, value = space[name], settings[name]
    if isinstance(setting, Choice):
        place = setting.index(value)
        return [*setting.options[:place], *setting.options[place + 1 :]]
    if isinstance(setting, Int):
        step = setting.step or 1
        return [v for v in (value + first * step, value - first * step) if setting.low <= v <= setting.high]
    unit, share = setting.unit(value), 1 / setting.count
    return [setting.at(u) for u in (unit + first * share, unit - first * share) if 0 < u < 1]


def reflected(unit: float) -> float:
    """Into 0..1 by reflection at the ends."""
    folded = abs(float(unit)) % 2
    return 2 - folded if folded > 1 else folded


def untried(
    history: History, space: Space, rng: np.random.Generator, draw: Callable[[], Settings] | None = None
) -> Settings | None:
    """The first of a few draws (default: at random) that no trial had; else any settings that none had, or None if all
    that there are were tried."""
    tried = history.tried
    sources = (draw, lambda: space.sample(rng)) if draw else (lambda: space.sample(rng),)
    for source in sources:
        for _ in range(DRAWS):
            settings = source()
            if key(settings) not in tried:
                return settings
    if any(math.isinf(setting.count) for setting in space.settings.values()):
        return space.sample(rng)
    # Among one more than were tried there is a new one, if there is any.
    left = [settings for settings in islice(space.grid(), len(tried) + 1) if key(settings) not in tried]
    return left[rng.integers(len(left))] if left else None
