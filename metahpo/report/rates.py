"""The inner rates of a learner."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from metahpo.learners.base import MetaLearner
from metahpo.picture import Picture

MOST_PRINTED_STEPS = 20


@dataclass(frozen=True)
class Rates:
    """The rate of each tensor and step: names [L], values [L, steps]; learnt: whether the outer loop learns them."""

    names: tuple[str, ...]
    values: np.ndarray
    learnt: bool

    def decimals(self) -> int:
        """Decimals that show three digits of the largest rate."""
        largest = self.largest()
        return min(max(2 - math.floor(math.log10(largest)), 0), 8) if largest else 3

    def largest(self) -> float:
        """The largest absolute rate that is finite."""
        return float(np.abs(self.values[np.isfinite(self.values)]).max(initial=0.0))


def inner_rates(learner: MetaLearner) -> Rates | None:
    """The rates of the learner's update rule, those by tensor and step or its one scalar; None where it has neither."""
    rule = getattr(learner, "rule", None)
    if rule is None:
        return None
    by_name: Callable[[], dict[str, Any]] | None = getattr(rule, "by_name", None)
    rows = by_name() if callable(by_name) else {"all": getattr(rule, "lr", None)}
    values = [_row(value) for value in rows.values()]
    found = [row for row in values if row is not None]
    if len(found) < len(values) or len({len(row) for row in found}) != 1:
        return None
    return Rates(tuple(rows), np.stack(found), any(p.requires_grad for p in rule.parameters()))


def rates_table(rates: Rates) -> str:
    """A markdown table, one row a tensor and one column a step."""
    steps, decimals = rates.values.shape[1], rates.decimals()
    heads = [f"step {step + 1}" for step in range(steps)] if steps > 1 or len(rates.names) > 1 else ["every step"]
    lines = [f"| tensor | {' | '.join(heads)} |", f"| --- |{' ---: |' * steps}"]
    for name, row in zip(rates.names, rates.values):
        lines.append(f"| `{name}` | {' | '.join(f'{value:.{decimals}f}' for value in row)} |")
    return "\n".join(lines)


def draw_rates(rates: Rates) -> Figure | None:
    """A heat map centred on zero, with the values in its cells; None for a single rate."""
    if rates.values.size == 1:
        return None
    count, steps = rates.values.shape
    reach = rates.largest() or 1.0
    figure = Picture(figsize=(11, 1.3 + 0.34 * count), dpi=100, layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(rates.values, cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto")
    axis.set_yticks(range(count), rates.names, family="monospace", fontsize=9)
    axis.set_xticks(range(steps), [str(step + 1) for step in range(steps)])
    axis.set(title="learnt inner rates" if rates.learnt else "inner rates (fixed)", xlabel="inner step")
    axis.set_xticks(np.arange(steps - 1) + 0.5, minor=True)
    axis.set_yticks(np.arange(count - 1) + 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="both", length=0)
    if steps <= MOST_PRINTED_STEPS:
        for (row, step), value in np.ndenumerate(rates.values):
            colour = "white" if abs(value) > 0.6 * reach else "black"
            text, size = f"{value:.{rates.decimals()}f}", 9 if steps <= 10 else 7
            axis.text(step, row, text, ha="center", va="center", color=colour, fontsize=size)
    figure.colorbar(image, ax=axis, fraction=0.03, pad=0.01)
    return figure


def _row(value: object) -> np.ndarray | None:
    """Rates by step from a tensor of none or one dimension, or a number."""
    if not isinstance(value, (torch.Tensor, int, float)):
        return None
    row = torch.as_tensor(value).detach().cpu().double().numpy()
    return np.atleast_1d(row) if row.ndim <= 1 and row.size else None
