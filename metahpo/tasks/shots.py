"""How many classes a task has, and how many support images of each: in a range, or uneven."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from metahpo.checks import check_choice, check_whole, refuse
from metahpo.errors import DataArgumentError, shown

Count = int | tuple[int, int]  # A number, or a range of numbers, both ends in it.
KINDS = ("linear", "step", "random")


def ends(count: Count) -> tuple[int, int]:
    """The lowest and the highest of a number or range."""
    return (count, count) if isinstance(count, int) else count


def check_count(owner: object, name: str, count: Any) -> Count:
    """A number of at least 1, or a range of such numbers, in plain Python; raises DataArgumentError for others."""
    if isinstance(count, (tuple, list)) and len(count) == 2:
        with suppress(ValueError):
            low, high = (check_whole(owner, name, end, at_least=1) for end in count)
            if low <= high:
                return low, high
    else:
        with suppress(ValueError):
            return check_whole(owner, name, count, at_least=1)
    expected = "a whole number of at least 1, or a range (low, high) of such numbers"
    refuse(owner, name, count, expected, DataArgumentError)


@dataclass(frozen=True)
class Imbalance:
    """Support sets with ``min`` to ``max`` images a class, their total ways x shots (Ochal et al. 2023).

    kind: "linear", evenly spaced from min to max, whose mean is the shots; "step", as many classes of min and of max as
    the total allows, and one between where that does not come out; "random", each size uniform in min..max, given the
    total. Which class gets which size is drawn. (The paper's step and random sets do not keep a total.)
    """

    kind: str
    min: int
    max: int

    def __post_init__(self) -> None:
        try:
            check_choice(self, "kind", self.kind, KINDS)
            least = check_whole(self, "min", self.min, at_least=1)
            most = check_whole(self, "max", self.max, at_least=least + 1)
        except ValueError:
            found = f"{shown(self.kind)}, min {shown(self.min)}, max {shown(self.max)}"
            raise DataArgumentError(
                f"imbalance: found {found}; expected {', '.join(KINDS)}, and 1 <= min < max"
            ) from None
        object.__setattr__(self, "min", least)
        object.__setattr__(self, "max", most)

    def check(self, shots: int) -> None:
        """Raises DataArgumentError if no such sizes have ``shots`` as their mean."""
        least, most = self.min, self.max
        if not least <= shots <= most:
            raise DataArgumentError(f"imbalance: {shots} shots, the mean, are not between min {least} and max {most}")
        if self.kind == "linear" and least + most != 2 * shots:
            mean = (least + most) / 2
            found = f"the mean from min {least} to max {most} is {mean:g}"
            raise DataArgumentError(f"imbalance: {found}, not {shots} shots")

    def sizes(self, ways: int, shots: int, rng: np.random.Generator) -> np.ndarray:
        """Support images [ways] of each class, ways x shots in all."""
        if self.kind == "random":
            return np.array(list(self._random(ways, ways * shots, rng)))
        if self.kind == "linear":
            # From almost half below min to half above max: so min and max get as many classes as other sizes.
            sizes = np.around(np.linspace(self.min - 0.49, self.max + 0.49, ways)).astype(int)
        else:
            more = ways * (shots - self.min)  # To hand out, to one class after the other.
            step = self.max - self.min
            sizes = self.min + np.clip(more - step * np.arange(ways), 0, step)
        return rng.permutation(sizes)

    def _random(self, ways: int, total: int, rng: np.random.Generator) -> Iterator[int]:
        # others[k][s]: the probability that k classes together have s images above their min.
        span = self.max - self.min + 1
        others = [np.ones(1)]
        for _ in range(ways - 1):
            others.append(np.convolve(others[-1], np.full(span, 1 / span)))
        left = total - ways * self.min
        for rest in reversed(others):
            extra = np.arange(span)
            fits = (left - extra >= 0) & (left - extra < len(rest))
            weights = np.where(fits, rest[np.where(fits, left - extra, 0)], 0.0)
            drawn = int(rng.choice(span, p=weights / weights.sum()))
            left -= drawn
            yield self.min + drawn
