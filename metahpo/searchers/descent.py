"""Descent in the unit cube by values and gradients, one trial at a time."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize

# The longest step, as a share of each range.
LONGEST = 0.3
# A slope so many times steeper than what was seen on the way is that of a crease (a training at the edge of chaos).
WILD = 20.0
# Updates of the curvature whose denominator is nearly zero are left out (Nocedal and Wright, equation 6.26).
NEGLIGIBLE = 1e-8


class Descent:
    """A trust region around the best point so far, with the curvature learnt from the gradients by the symmetric
    rank-one formula (Nocedal and Wright 2006, algorithm 6.2), in the box of the cube.

    point, loss, slope: where it begins: coordinates [D] in 0..1, the loss there and its gradient [D]. radius: the
    longest step in any coordinate at first; shortest: below it the descent is over. grain: [D], the least step that
    makes a difference in a coordinate, 0 for a continuous one. tolerance: the descent is over when no more than this
    share of the loss, or of what it has gained, is to be expected of a step.

    ``see`` takes the next trial's result, ``next`` says where to look. The start of the curvature is unknown, so the
    first step goes straight down the slope.
    """

    def __init__(
        self,
        point: np.ndarray,
        loss: float,
        slope: np.ndarray,
        *,
        radius: float,
        shortest: float,
        grain: np.ndarray,
        tolerance: float,
    ):
        self.point, self.loss, self.slope = point, loss, slope
        self.radius, self._shortest, self._grain, self._tolerance = radius, shortest, grain, tolerance
        self._start, self._curvature = loss, None

    def see(self, point: np.ndarray, loss: float | None, slope: np.ndarray | None) -> None:
        """The result at a point that ``next`` gave; loss None: the trial failed; slope None: it told no gradient."""
        step = point - self.point
        length = float(np.abs(step).max())
        if loss is None or length == 0:
            self.radius = min(self.radius, length) / 2
            return
        down, expected = float(self.slope @ step), self._expected(step)
        gain = self.loss - loss
        if slope is not None and self._steepest(slope) > WILD * max(self._steepest(self.slope), abs(gain) / length):
            slope = None
        if slope is not None:
            self._learn(step, slope - self.slope)
        if gain > 0:
            if gain > 0.75 * expected and length > 0.8 * self.radius:
                self.radius = min(2 * self.radius, LONGEST)
            elif gain < 0.1 * expected or slope is None:
                self.radius /= 2
            self.point, self.loss = point, loss
            self.slope = self.slope if slope is None else slope
        else:
            least = 0.5 if slope is None else _least(down, float(slope @ step), -gain)
            self.radius = min(self.radius, length) * min(max(least, 0.1), 0.5)

    def next(self) -> np.ndarray | None:
        """The point [D] to look at; None: the descent is over."""
        steepest = self._steepest(self.slope)
        if self.radius < self._shortest or steepest == 0:
            return None
        reach = np.maximum(self.radius, self._grain)
        low, high = np.maximum(-reach, -self.point), np.minimum(reach, 1 - self.point)
        if self._curvature is None:
            step = np.clip(-self.slope / steepest * reach, low, high)
        else:
            slope, curvature = self.slope / steepest, self._curvature / steepest
            found = minimize(
                lambda s: (slope @ s + s @ curvature @ s / 2, slope + curvature @ s),
                np.zeros_like(slope),
                jac=True,
                bounds=list(zip(low, high)),
                method="L-BFGS-B",
            )
            step = np.clip(found.x, low, high)
        if self._expected(step) <= self._tolerance * min(self._start - self.loss, abs(self.loss)):
            return None
        return self.point + step

    def _expected(self, step: np.ndarray) -> float:
        """What the step should gain."""
        bend = 0.0 if self._curvature is None else step @ self._curvature @ step / 2
        return -float(self.slope @ step + bend)

    def _learn(self, step: np.ndarray, change: np.ndarray) -> None:
        if self._curvature is None:
            along = float(step @ change)
            scale = float(change @ change) / along if along > 0 else self._steepest(self.slope) / self.radius
            self._curvature = scale * np.eye(len(step))
        rest = change - self._curvature @ step
        if abs(rest @ step) > NEGLIGIBLE * np.linalg.norm(rest) * np.linalg.norm(step):
            self._curvature = self._curvature + np.outer(rest, rest) / (rest @ step)

    @staticmethod
    def _steepest(slope: np.ndarray) -> float:
        return float(np.abs(slope).max())


def _least(before: float, after: float, rise: float) -> float:
    """Where on the way 0..1 the cubic with these slopes at both ends is least (Nocedal and Wright, equation 3.59)."""
    first = before + after - 3 * rise
    square = first**2 - before * after
    if square <= 0:
        return 0.5
    second = np.sqrt(square)
    return 1 - (after + second - first) / (after - before + 2 * second)
