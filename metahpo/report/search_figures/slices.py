"""Slices: the score against each setting."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metahpo.picture import Picture
from metahpo.report.search_figures.looks import (
    BEST,
    FAILED,
    Scale,
    Words,
    budget_of,
    budgets_of,
    draw_failed,
    draw_points,
    in_legend,
    is_multi_fidelity,
    rung_colours,
)
from metahpo.report.search_figures.ticks import short, text, ticks
from metahpo.searchers.settings import Setting
from metahpo.searchers.study import Study

COLUMNS = 4
# Of a setting with at most so many values the points are spread sideways, or they would hide one another.
MOST_SPREAD = 12


@dataclass(frozen=True)
class Slice:
    """The complete trials [N] that have the setting: places in the unit interval, scores, rungs (places in the
    search's budgets), numbers; and the failed ones' places [F] and numbers [F]."""

    name: str
    setting: Setting
    places: np.ndarray
    scores: np.ndarray
    rungs: np.ndarray
    numbers: np.ndarray
    failed: np.ndarray
    failed_numbers: np.ndarray


@dataclass(frozen=True)
class Slices:
    """A slice a setting; best: the number of the best trial."""

    panels: tuple[Slice, ...]
    budgets: tuple[float, ...]
    by_budget: bool
    best: int | None


def slices(study: Study) -> Slices:
    """The slices of a study by the first objective. Trials that are at work are left out."""
    complete = [r for r in study.trials if r.state == "complete"]
    failed = [r for r in study.trials if r.state == "failed"]
    budgets = budgets_of(complete)
    panels = []
    for name, setting in study.space.settings.items():
        there = [r for r in complete if name in r.settings]
        lost = [r for r in failed if name in r.settings]
        panels.append(
            Slice(
                name,
                setting,
                np.array([setting.unit(r.settings[name]) for r in there]),
                np.array([r.score for r in there], dtype=float),
                np.array([budgets.index(budget_of(r)) for r in there], dtype=int),
                np.array([r.number for r in there], dtype=int),
                np.array([setting.unit(r.settings[name]) for r in lost]),
                np.array([r.number for r in lost], dtype=int),
            )
        )
    best = study.best
    return Slices(tuple(panels), budgets, is_multi_fidelity(study.trials), best and best.number)


def draw_slices(data: Slices, words: Words) -> Figure:
    """A panel a setting, in rows of four, over one axis of scores."""
    count = len(data.panels)
    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = Picture(figsize=(max(5.0, 3.1 * columns), 0.7 + 2.8 * rows), dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    scale = Scale.of((score for panel in data.panels for score in panel.scores), words.higher())
    colours, any_failed = rung_colours(len(data.budgets) or 1), any(len(panel.failed) for panel in data.panels)
    scale.prepare(axes[0], any_failed)
    size = 20 if max(len(panel.places) for panel in data.panels) <= 120 else 9
    for axis, panel in zip(axes, data.panels):
        _draw_panel(axis, panel, data.best, scale, colours, size)
    for axis in axes[count:]:
        axis.set_visible(False)
    figure.suptitle("score by setting", fontsize=12)
    figure.supylabel(words.axis(), fontsize=10)
    handles, labels = [], []
    if data.by_budget:
        for rung in in_legend(len(data.budgets)):
            handles.append(axes[0].scatter([], [], 22, color=colours[rung]))
            labels.append(words.budget(data.budgets[rung]))
    if data.best is not None:
        handles.append(axes[0].scatter([], [], 60, facecolors="none", edgecolors=BEST, linewidth=1.8))
        labels.append(f"best (trial {data.best})")
    if any(scale.beyond(panel.scores).any() for panel in data.panels):
        handles.append(axes[0].scatter([], [], 24, color="0.5", marker="v" if words.higher() else "^"))
        labels.append("off the scale")
    if any_failed:
        handles.append(axes[0].scatter([], [], 24, **FAILED))
        labels.append("failed (no score)")
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4 if columns > 2 else 2, frameon=False)
    return figure


def _draw_panel(axis: Axes, panel: Slice, best: int | None, scale: Scale, colours: list, size: float) -> None:
    x, y = _spread(panel.setting, panel.places, panel.numbers), scale.clip(panel.scores)
    draw_points(axis, scale, x, panel.scores, size, [colours[rung] for rung in panel.rungs], None)
    chosen = panel.numbers == best
    axis.scatter(x[chosen], y[chosen], 70, facecolors="none", edgecolors=BEST, linewidth=1.8, zorder=4)
    draw_failed(axis, _spread(panel.setting, panel.failed, panel.failed_numbers))
    places, labels = ticks(panel.setting, most=4)
    crowded = sum(map(len, labels)) > 30
    axis.set_xticks(places, labels, fontsize=8, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    axis.set(xlim=(-0.04, 1.04))
    axis.set_title(short(panel.name), fontsize=10, pad=14 if panel.setting.when else None)
    if panel.setting.when:
        axis.text(0.5, 1.02, _condition(panel.setting), transform=axis.transAxes, fontsize=7, ha="center", va="bottom")
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(alpha=0.25)


def _condition(setting: Setting) -> str:
    parts = [f"{name} is {' or '.join(text(value) for value in values)}" for name, values in setting.when.items()]
    whole = f"where {' and '.join(parts)}"
    return whole if len(whole) <= 60 else f"{whole[:59]}…"


def _spread(setting: Setting, places: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The places, those of a setting with few values beside one another, the same each time."""
    if setting.count > MOST_SPREAD:
        return places
    # Multiples of the golden section never come close together.
    offsets = (numbers * 0.6180339887) % 1.0 - 0.5
    return places + 0.5 * offsets / setting.count
