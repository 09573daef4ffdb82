"""Noticing losses and gradients that are not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from metahpo.training.engines import MetaGradient


class FiniteCheck:
    """Looks at the losses and gradients of ``every`` steps at once for any that are NaN or infinite.

    A look waits for the device. With 1 it comes before each update; with more a GPU is kept busy, and a bad step is
    found after up to ``every`` - 1 updates more. ``add`` and ``look`` return what is wrong with the first bad step, or
    None. loss: of the last step looked at; signum: a signal that any rank had received by then.
    """

    def __init__(self, every: int):
        self.every = every
        self.loss: float | None = None
        self.signum: int | None = None
        self._places: list[tuple[int, int, Sequence[int]]] = []
        self._values: list[Tensor] = []

    def add(
        self, epoch: int, iteration: int, numbers: Sequence[int], result: MetaGradient, signals: Tensor | None = None
    ) -> str | None:
        """Notes one step (epoch and iteration from 1, its tasks' numbers, the ranks' signals), before its update."""
        # The largest entry of each gradient: infinite or NaN if any entry is, and it cannot overflow as a sum might.
        grads = [g for g in result.grads.values() if g.numel()]
        largest = torch.stack(torch._foreach_norm(grads, float("inf"))).max()
        self._places.append((epoch, iteration, numbers))
        parts = [result.losses.detach(), largest[None], result.loss.detach()[None]]
        self._values.append(torch.cat(parts if signals is None else [*parts, signals]))
        return self._look(updated=False) if len(self._values) >= self.every else None

    def look(self) -> str | None:
        """Looks at what has not been looked at: before a checkpoint is written, and wherever a run may stop."""
        return self._look(updated=True)

    def _look(self, updated: bool) -> str | None:
        """updated: whether the last step's update has been made."""
        if not self._values:
            return None
        rows, places = torch.stack(self._values).tolist(), self._places
        self._values, self._places = [], []
        for index, ((epoch, iteration, numbers), row) in enumerate(zip(places, rows)):
            largest, self.loss, *signals = row[len(numbers) :]
            self.signum = int(max(signals, default=0)) or self.signum
            bad = [number for number, loss in zip(numbers, row) if not math.isfinite(loss)]
            if bad or not math.isfinite(largest):
                what = (
                    f"the loss of task {bad[0]} is not finite"
                    if bad
                    else f"the gradient of tasks {numbers[0]} to {numbers[-1]} is not finite"
                )
                changed = updated or index < len(rows) - 1
                now = "have been updated with it since" if changed else "are as before this step"
                return f"epoch {epoch}, iteration {iteration}: {what} (parameters {now})"
        return None
