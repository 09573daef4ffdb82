"""Parallel coordinates: each trial a line through its settings to its score."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from metahpo.picture import Picture
from metahpo.report.search_figures.looks import BEST, Scale, Words, counted, score_colours
from metahpo.report.search_figures.ticks import short, ticks
from metahpo.searchers.space import Space
from metahpo.searchers.study import Study

# Longer names are written aslant.
LONGEST_LEVEL = 14


@dataclass(frozen=True)
class Parallel:
    """The settings of N trials as places in the unit interval [N, D] (NaN: does not exist), scores [N], worst first."""

    space: Space
    numbers: tuple[int, ...]
    places: np.ndarray
    scores: np.ndarray
    best: int | None


def parallel(study: Study) -> Parallel:
    """The complete trials of a study, by the first objective; of those with the same settings that were trained on
    from one another the last alone. best: the number of the study's best trial."""
    records = study.trials
    gone_on = {r.parent for r in records if r.state == "complete"}
    best = study.best
    shown = [r for r in records if r.state == "complete" and r.number not in gone_on]
    # The best comes last, so that it is drawn over the others.
    sign = 1 if study.directions[0] == "maximize" else -1
    shown.sort(key=lambda r: (best is not None and r.number == best.number, sign * (r.score or 0.0)))
    return Parallel(
        study.space,
        tuple(r.number for r in shown),
        np.array([study.space.encode(r.settings, missing=math.nan) for r in shown]).reshape(-1, len(study.space)),
        np.array([r.score for r in shown], dtype=float),
        None if best is None else best.number,
    )


def draw_parallel(data: Parallel, words: Words) -> Figure:
    """An axis a setting, the last one the score, which is the colour bar too."""
    names, count = [short(name) for name in data.space], len(data.space)
    figure = Picture(figsize=(min(max(8.0, 2.5 + 1.2 * count), 40.0), 5.6), dpi=100, layout="constrained")
    axis = figure.subplots()
    scale, colours = Scale.of(data.scores, words.higher()), score_colours(words.higher())
    norm = scale.norm()
    heights = np.asarray(norm(scale.clip(data.scores)))
    # Of many lines the poor ones should not hide the others.
    crowd = min(1.0, 8 / math.sqrt(max(len(data.scores), 1)))
    outline = [withStroke(linewidth=4.5, foreground="white")]
    for number, places, height in zip(data.numbers, data.places, heights):
        best = number == data.best
        good = height if words.higher() else 1 - height
        line = {"color": BEST if best else colours(height), "alpha": 1.0 if best else crowd + (1 - crowd) * good**2}
        # A setting between two that do not exist has no line: its point shows it.
        axis.plot(
            range(count + 1),
            [*places, height],
            marker="o",
            markersize=4.5 if best else 2.5,
            linewidth=2.2 if best else 0.6 + 0.6 * crowd,
            path_effects=outline if best else None,
            label=f"best (trial {number})" if best else None,
            **line,
        )
    axis.vlines(range(count), 0, 1, color="0.3", linewidth=0.8, zorder=0.5)
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    for column, setting in enumerate(data.space.settings.values()):
        for place, label in zip(*ticks(setting)):
            axis.plot([column - 0.03, column], [place, place], color="0.3", linewidth=0.8)
            axis.text(column - 0.06, place, label, fontsize=8, ha="right", va="center", bbox=paper, zorder=5)
    axis.set_xticks(range(count), names, fontsize=9)
    if max(map(len, names)) > LONGEST_LEVEL:
        axis.set_xticks(range(count), names, rotation=25, ha="right", rotation_mode="anchor")
    axis.set(xlim=(-0.55, count), ylim=(-0.03, 1.03), yticks=[])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    bar = figure.colorbar(
        ScalarMappable(norm, colours),
        cax=axis.inset_axes((1.0, 0.03 / 1.06, min(0.03, 0.25 / (count + 0.55)), 1 / 1.06)),
    )
    bar.set_label(words.axis())
    cut = scale.beyond(data.scores).sum()
    title = f"{counted(len(data.numbers), 'trial')} through their settings; darker is better"
    axis.set_title(f"{title}\n({cut} off the scale, drawn at its edge)" if cut else title, loc="left", fontsize=12)
    if data.best in data.numbers:
        axis.legend(loc="lower right", bbox_to_anchor=(1.0, 0.99), frameon=False)
    return figure
