"""Acquisition functions: BoTorch's, and the search for where they are largest."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection

import numpy as np
import torch

from metahpo.searchers.botorch_parts import (
    AcquisitionFunction,
    BotorchWarning,
    LogExpectedImprovement,
    Model,
    ProbabilityOfImprovement,
    SobolQMCNormalSampler,
    UpperConfidenceBound,
    qLogExpectedImprovement,
)
from metahpo.searchers.settings import Choice
from metahpo.searchers.space import Space

ACQUISITIONS = ("log_ei", "ucb", "pi", "batch_ei")
# Random points to begin with, the best of which are climbed from for so many rounds at most.
RANDOM, STARTS, ROUNDS = 1000, 6, 20
# Widths of the steps in a continuous range: a climb that finds nothing better goes on with the next.
WIDTHS = (0.1, 0.03, 0.01, 0.003, 0.001)
# Ranges of more values than this are climbed in as if they were continuous.
FEW = 1000


def acquisition(
    name: str, gp: Model, best: float, beta: float, pending: np.ndarray | None, seed: int
) -> AcquisitionFunction:
    """One of ``ACQUISITIONS`` for values that should be large.

    best: the value to improve on. beta: of the confidence bound mean + sqrt(beta) * deviation. pending: inputs [P, F]
    of trials at work, for batch_ei, which integrates over what they may give; seed: of its samples.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BotorchWarning)
        if name == "log_ei":
            return LogExpectedImprovement(gp, best)
        if name == "pi":
            return ProbabilityOfImprovement(gp, best)
        if name == "ucb":
            return UpperConfidenceBound(gp, beta)
        sampler = SobolQMCNormalSampler(torch.Size([64]), seed=seed)
        return qLogExpectedImprovement(
            gp, best, sampler, X_pending=None if pending is None else torch.as_tensor(pending)
        )


class Cube:
    """The points [N, D] of the unit cube that settings of a space have, many at a time; see ``Space.encode``."""

    def __init__(self, space: Space):
        self.space = space
        # The places of the values of each setting that has few, in order.
        self._places = [
            np.array([s.unit(v) for v in s.values()]) if s.count <= FEW else None for s in space.settings.values()
        ]
        names = list(space)
        # Those that others depend on come first.
        self._conditions = [
            (names.index(name), names.index(other), [space[other].unit(v) for v in values])
            for name in space.parents_first()
            for other, values in space[name].when.items()
        ]

    def snap(self, points: np.ndarray) -> np.ndarray:
        """The nearest points that settings have; 0.5 for a setting that does not exist."""
        points = np.clip(points, 0.0, 1.0)
        for column, places in enumerate(self._places):
            if places is not None:
                middles = (places[1:] + places[:-1]) / 2
                points[:, column] = places[np.searchsorted(middles, points[:, column])]
        there = np.ones(points.shape, bool)
        for column, other, values in self._conditions:
            there[:, column] &= there[:, other] & (np.abs(points[:, [other]] - values) < 1e-9).any(1)
        return np.where(there, points, 0.5)

    def neighbours(self, point: np.ndarray, width: float, rng: np.random.Generator) -> np.ndarray:
        """Points [N, D] that differ from ``point`` [D] in one setting, and a few that differ in all continuous ones."""
        found, continuous = [], []
        for column, (setting, places) in enumerate(zip(self.space.settings.values(), self._places)):
            if places is None:
                continuous.append(column)
                values = point[column] + width * rng.normal(size=4)
            elif isinstance(setting, Choice) or len(places) <= 4:
                values = places
            else:
                at = int(np.argmin(np.abs(places - point[column])))
                near = np.clip([at - 2, at - 1, at + 1, at + 2], 0, len(places) - 1)
                values = places[[*near, rng.integers(len(places))]]
            rows = np.tile(point, (len(values), 1))
            rows[:, column] = values
            found.append(rows)
        if len(continuous) > 1:
            rows = np.tile(point, (6, 1))
            rows[:, continuous] += width * rng.normal(size=(6, len(continuous)))
            found.append(rows)
        return self.snap(np.concatenate(found))


def maximised(
    cube: Cube,
    score: Callable[[np.ndarray], np.ndarray],
    centres: np.ndarray,
    rng: np.random.Generator,
    taken: Collection[bytes] = (),
) -> np.ndarray | None:
    """The point [D] where ``score`` (of points [N, D], gives [N]) is largest, or nearly; by climbing from several.

    centres: good points [M, D], near which it is looked too. taken: ``keys`` of points that are not wanted; None if all
    that were looked at are such.
    """
    dimensions = len(cube.space)
    near = [cube.neighbours(centre, WIDTHS[0], rng) for centre in centres]
    points = np.concatenate([cube.snap(rng.random((RANDOM, dimensions))), *near])
    seen = _Seen(score, taken)
    scores = seen(points)
    starts = points[np.argsort(-scores)[:STARTS]]
    heights, levels = seen(starts), np.zeros(len(starts), int)
    for _ in range(ROUNDS):
        at_work = np.flatnonzero(levels < len(WIDTHS))
        if not len(at_work):
            break
        groups = [cube.neighbours(starts[i], WIDTHS[levels[i]], rng) for i in at_work]
        scores, first = seen(np.concatenate(groups)), 0
        for i, group in zip(at_work, groups):
            mine = scores[first : first + len(group)]
            first += len(group)
            best = int(np.argmax(mine))
            if mine[best] > heights[i]:
                starts[i], heights[i] = group[best], mine[best]
            else:
                levels[i] += 1
    best = int(np.argmax(heights))
    return starts[best] if np.isfinite(heights[best]) else None


def keys(points: np.ndarray) -> list[bytes]:
    """The same for points (of [N, D]) of the same settings, whatever rounding did."""
    return [point.tobytes() for point in np.round(points, 9)]


class _Seen:
    """The scores of points, each computed once; minus infinity for those that are taken."""

    def __init__(self, score: Callable[[np.ndarray], np.ndarray], taken: Collection[bytes]):
        self._score, self._scores = score, dict.fromkeys(taken, -np.inf)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        names = keys(points)
        new = {name: i for i, name in enumerate(names) if name not in self._scores}
        if new:
            self._scores.update(zip(new, self._score(points[list(new.values())])))
        return np.array([self._scores[name] for name in names])
