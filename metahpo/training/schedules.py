"""Schedules of the outer rate, as pure functions of the epoch."""

from __future__ import annotations

import math


def cosine(epoch: int, epochs: int, start: float, end: float) -> float:
    """Cosine annealing from ``start`` at epoch 0 towards ``end`` at ``epochs`` (Loshchilov & Hutter 2017, eq. 5)."""
    return end + (start - end) * (1 + math.cos(math.pi * epoch / epochs)) / 2
