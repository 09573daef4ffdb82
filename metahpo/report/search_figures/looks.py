"""What the pictures of a search share: words, the scale of scores, colours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize

from metahpo.searchers.records import TrialRecord

# Vermilion, which no kind of colour blindness takes for one of viridis (Okabe and Ito 2008).
BEST = "#d55e00"
FAILED: dict[str, Any] = {"marker": "x", "color": "0.35", "linewidth": 1.0}
MOST_IN_LEGEND = 8


@dataclass(frozen=True)
class Words:
    """What the numbers of a search are called: its objectives and the unit of its budgets."""

    objectives: tuple[str, ...]
    directions: tuple[str, ...]
    unit: str = "budget"

    def higher(self, objective: int = 0) -> bool:
        """Whether a higher score is better."""
        return self.directions[objective] == "maximize"

    def axis(self, objective: int = 0) -> str:
        """The label of an axis of scores."""
        return f"{self.objectives[objective]} ({'higher' if self.higher(objective) else 'lower'} is better)"

    def budget(self, amount: float) -> str:
        """An amount of training; an infinite one is that of a trial without a budget."""
        if math.isinf(amount):
            return "full budget"
        if self.unit == "budget":
            return f"budget {amount:g}"
        if self.unit == "data":
            return f"{amount:.3g} of the data"
        return f"{amount:g} {self.unit.removesuffix('s') if amount == 1 else self.unit}"

    @property
    def used(self) -> str:
        """The label of an axis of the training used in all."""
        unit = {"budget": "", "data": " (times the whole data)"}.get(self.unit, f" ({self.unit})")
        return f"budget used so far{unit}"


@dataclass(frozen=True)
class Scale:
    """How scores are drawn: on a logarithmic axis or not, from low to high; those beyond are drawn at its edge."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def of(cls, scores: Iterable[float], higher: bool) -> Scale:
        """Logarithmic for losses over more than a decade and a half; cut where a few are far worse than most."""
        values = np.array([score for score in scores if math.isfinite(score)])
        if not len(values):
            return cls(0.0, 1.0)
        low, high = float(values.min()), float(values.max())
        if not higher and 0 < 30 * low < high:
            return cls(low, high, log=True)
        # Of three in four trials; a diverged one should not make all others look the same.
        usual = abs(float(np.quantile(values, 0.25 if higher else 0.75)) - (high if higher else low))
        if usual and high - low > 20 * usual:
            low, high = (high - 2 * usual, high) if higher else (low, low + 2 * usual)
        if low == high:
            low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
        return cls(low, high)

    def clip(self, scores: np.ndarray) -> np.ndarray:
        return np.clip(scores, self.low, self.high)

    def beyond(self, scores: np.ndarray) -> np.ndarray:
        """Which of them have no place of their own."""
        return (scores < self.low) | (scores > self.high)

    def norm(self) -> Normalize:
        return (LogNorm if self.log else Normalize)(self.low, self.high)

    def prepare(self, axis: Axes, room_below: bool = False) -> None:
        """Sets the limits of an axis's ordinate; room_below: for the marks of failed trials."""
        below = 0.14 if room_below else 0.05
        if self.log:
            reach = self.high / self.low
            axis.set(yscale="log", ylim=(self.low / reach**below, self.high * reach**0.05))
        else:
            reach = self.high - self.low
            axis.set_ylim(self.low - below * reach, self.high + 0.05 * reach)


def draw_points(
    axis: Axes, scale: Scale, x: np.ndarray, scores: np.ndarray, size: float, colours: Sequence[Any], label: str | None
) -> None:
    """Points [N] of one colour each; those off the scale as triangles at its edge."""
    beyond = scale.beyond(scores)
    for chosen, marker in ((~beyond, "o"), (beyond & (scores < scale.low), "v"), (beyond & (scores > scale.high), "^")):
        if chosen.any():
            shown = [colour for colour, one in zip(colours, chosen) if one]
            name = label if marker == "o" else "off the scale" if label else None
            axis.scatter(x[chosen], scale.clip(scores[chosen]), size, c=shown, marker=marker, alpha=0.85, label=name)


def draw_failed(axis: Axes, x: np.ndarray, label: str | None = None) -> None:
    """Crosses along the bottom."""
    if len(x):
        bottom = axis.get_xaxis_transform()
        axis.scatter(x, np.full(len(x), 0.045), 26, transform=bottom, label=label, **FAILED)


def counted(count: int, what: str) -> str:
    return f"{count} {what if count == 1 else what + 's'}"


def score_colours(higher: bool) -> Any:
    """A colour map in which better is darker, so that on white the poor ones recede."""
    return matplotlib.colormaps["viridis_r" if higher else "viridis"]


def budget_of(record: TrialRecord) -> float:
    """Infinite where a trial has none, for it was trained fully."""
    return math.inf if record.budget is None else record.budget


def budgets_of(records: Iterable[TrialRecord]) -> tuple[float, ...]:
    """The different budgets, in order: the rungs of a search."""
    return tuple(sorted({budget_of(record) for record in records}))


def rung_colours(count: int) -> list[Any]:
    """A colour a rung, higher ones darker; one colour alone where there is one rung."""
    colours = matplotlib.colormaps["viridis_r"]
    # The lightest is hard to see on white.
    return [colours(0.55)] if count == 1 else [colours(0.08 + 0.9 * i / (count - 1)) for i in range(count)]


def in_legend(count: int) -> Sequence[int]:
    """Which of so many rungs a legend names."""
    if count <= MOST_IN_LEGEND:
        return range(count)
    return sorted({round(i * (count - 1) / (MOST_IN_LEGEND - 1)) for i in range(MOST_IN_LEGEND)})


def is_multi_fidelity(records: Iterable[TrialRecord]) -> bool:
    return any(record.budget is not None for record in records)
