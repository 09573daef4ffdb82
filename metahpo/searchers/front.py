"""Several objectives at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from metahpo.searchers.base import History


def pareto_front(losses: np.ndarray) -> list[int]:
    """The rows of [N, M], lower is better, that no other row beats: none as good in all and better in one."""
    beats = (losses[:, None] <= losses[None]).all(-1) & (losses[:, None] < losses[None]).any(-1)
    return [int(row) for row in np.flatnonzero(~beats.any(0))]


def scalarised(history: History, rng: np.random.Generator) -> History:
    """The history with one loss a trial: where there are several objectives, a weighted one with random weights.

    The augmented Chebyshev norm of ParEGO (Knowles 2006, equation 2) over objectives scaled to 0..1, its weights drawn
    anew each time, leads searchers made for one objective along the whole Pareto front.
    """
    if not history.complete or len(history.complete[0].losses or ()) < 2:
        return history
    losses = np.array([o.losses for o in history.complete])
    low, high = losses.min(0), losses.max(0)
    weights = rng.dirichlet(np.ones(losses.shape[1]))
    weighted = weights * (losses - low) / np.where(high > low, high - low, 1.0)
    values = dict(zip((o.number for o in history.complete), weighted.max(1) + 0.05 * weighted.sum(1)))
    scaled = [
        replace(o, loss=float(values[o.number])) if o.number in values else o for o in history
    ]
    return History(scaled, history.known)
