"""How many classes a task has, and how many support images of each: in a range, or uneven."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from metahpo.errors import DataError

Count = int | tuple[int, int]  # A number, or a range of numbers, both ends in it.
KINDS = ("linear", "step", "random")


def ends(count: Count) -> tuple[int, int]:
    """The lowest and the highest of a number or range."""
    return (count, count) if isinstance(count, int) else count


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
        if self.kind not in KINDS or not 1 <= self.min < self.max:
            found = f"{self.kind!r}, min {self.min}, max {self.max}"
            raise DataError(f"imbalance: found {found}; expected {', '.join(KINDS)}, and 1 <= min < max")

    def check(self, shots: int) -> None:
        """Raises DataError if no such sizes have ``shots`` as their mean."""
        if not self.min <= shots <= self.max:
            raise DataError(f"imbalance: {shots} shots, the mean, are not between min {self.min} and max {self.max}")
        if self.kind == "linear" and self.min + self.max != 2 * shots:
            mean = (self.min + self.max) / 2
            raise DataError(f"imbalance: the mean from min {self.min} to max {self.max} is {mean:g}, not {shots} shots")

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
