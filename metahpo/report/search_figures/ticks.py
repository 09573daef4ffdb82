"""Axes of settings: the unit interval, with the settings' own values written at their places."""

from __future__ import annotations

import json
import math
from typing import Any

from matplotlib.ticker import MaxNLocator

from metahpo.searchers.settings import Choice, Setting

LONGEST_TEXT, LONGEST_NAME = 14, 28


def ticks(setting: Setting, most: int = 5) -> tuple[list[float], list[str]]:
    """Places in the unit interval and what is written there; most: about how many, twice as many for a choice."""
    if isinstance(setting, Choice):
        values = list(setting.options)[:: math.ceil(len(setting.options) / (2 * most))]
    else:
        values = _numbers(setting, most)
    return [setting.unit(value) for value in values], [text(value) for value in values]


def text(value: Any, digits: int = 4) -> str:
    """A value of a setting, short."""
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    # As YAML writes them.
    written = json.dumps(value) if value is None or isinstance(value, bool) else str(value)
    if len(written) <= LONGEST_TEXT:
        return written
    return f"{written[: LONGEST_TEXT // 2 - 1]}…{written[-LONGEST_TEXT // 2 :]}"


def short(name: str) -> str:
    """A setting's name, without the beginning of a long one."""
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def _numbers(setting: Any, most: int) -> list[Any]:
    if setting.step is not None:
        values = setting.values()
        return list(values[:: math.ceil(len(values) / (most + 1))])
    if setting.log:
        found = _logarithmic(setting.low, setting.high, most)
    else:
        whole = isinstance(setting.low, int)
        found = [float(v) for v in MaxNLocator(most, integer=whole).tick_values(setting.low, setting.high)]
    inside = [value for value in found if setting.low <= value <= setting.high]
    return [round(value) for value in inside] if isinstance(setting.low, int) else inside


def _logarithmic(low: float, high: float, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    whole = [float(f"1e{decade}") for decade in decades]
    inside = [value for value in whole if low <= value <= high]
    if len(inside) > 2:
        return inside[:: math.ceil(len(inside) / (most + 1))]
    finer = [float(f"{m}e{decade}") for decade in decades for m in (1, 2, 5)]
    inside = [value for value in finer if low <= value <= high]
    return inside if len(inside) > 1 else [low, high]
