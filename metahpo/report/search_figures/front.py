"""The Pareto front of a search with several objectives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metahpo.picture import Picture
from metahpo.report.search_figures.looks import BEST, Words, counted
from metahpo.searchers.study import Study

MOST_NUMBERED = 12


@dataclass(frozen=True)
class Front:
    """The scores [F, M] of the trials that no other one beats, with their numbers, and those [N, M] of all others."""

    scores: np.ndarray
    numbers: tuple[int, ...]
    beaten: np.ndarray


def front(study: Study) -> Front:
    """The front of a study, by the first objective."""
    best, width = study.front, len(study.directions)
    numbers = tuple(r.number for r in best)
    beaten = [r.scores for r in study.trials if r.state == "complete" and r.number not in numbers]
    return Front(
        np.array([r.scores for r in best], dtype=float).reshape(-1, width),
        numbers,
        np.array(beaten, dtype=float).reshape(-1, width),
    )


def draw_front(data: Front, words: Words) -> Figure:
    """A panel for each two objectives."""
    pairs = list(combinations(range(len(words.objectives)), 2))
    columns = min(3, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    size = (7.5, 5.0) if len(pairs) == 1 else (4.4 * columns, 0.7 + 3.8 * rows)
    figure = Picture(figsize=size, dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (x, y) in zip(axes, pairs):
        _draw_pair(axis, data, words, x, y, alone=len(pairs) == 1)
    for axis in axes[len(pairs) :]:
        axis.set_visible(False)
    title = f"Pareto front: {counted(len(data.numbers), 'trial')} that no other one beats in all objectives"
    figure.suptitle(title, fontsize=12)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_pair(axis: Axes, data: Front, words: Words, x: int, y: int, alone: bool) -> None:
    axis.scatter(data.beaten[:, x], data.beaten[:, y], 20, color="0.65", label="beaten")
    if alone:
        # What is at least as bad as a point of the front lies behind the steps.
        axis.step(data.scores[:, x], data.scores[:, y], where="post", color=BEST, linewidth=1.2, alpha=0.6)
    axis.scatter(data.scores[:, x], data.scores[:, y], 40, color=BEST, label="on the front", zorder=3)
    if len(data.numbers) <= MOST_NUMBERED and alone:
        for number, point in zip(data.numbers, data.scores):
            axis.annotate(str(number), point[[x, y]], (5, 5), textcoords="offset points", fontsize=8)
    axis.set(xlabel=words.axis(x), ylabel=words.axis(y))
    for scale, index in (("x", x), ("y", y)):
        values = np.concatenate([data.scores[:, index], data.beaten[:, index]])
        if not words.higher(index) and 0 < 30 * values.min() < values.max():
            axis.set(**{f"{scale}scale": "log"})
    axis.grid(alpha=0.25)
