"""Optimisation history: the score of each trial, and the best so far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metahpo.picture import Picture
from metahpo.report.search_figures.looks import (
    BEST,
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
from metahpo.searchers.base import Proposal
from metahpo.searchers.study import Study


@dataclass(frozen=True)
class SearchHistory:
    """The complete trials [N] by number and the failed ones [F].

    x: the trial's number or, in a multi-fidelity search, the budget that the trials up to and with it have used.
    rungs: the place of each budget in ``budgets``. best_x, best: the best score so far, a step line; in a
    multi-fidelity search it is that of the largest budget alone, for others cannot be compared with it.
    """

    x: np.ndarray
    scores: np.ndarray
    rungs: np.ndarray
    failed_x: np.ndarray
    budgets: tuple[float, ...]
    best_x: np.ndarray
    best: np.ndarray
    by_budget: bool


def history(study: Study) -> SearchHistory:
    """The history of a study, by the first objective. Trials that are at work are left out."""
    records = study.trials
    by_budget = is_multi_fidelity(records)
    used = np.cumsum([study.duration(Proposal(r.settings, r.budget, r.parent)) for r in records])
    x = used if by_budget else np.arange(len(records))
    complete = [r for r in records if r.state == "complete"]
    budgets = budgets_of(complete)
    scores = np.array([r.score for r in complete], dtype=float)
    places, rungs = x[[r.number for r in complete]], np.array([budgets.index(budget_of(r)) for r in complete])
    top = rungs == len(budgets) - 1
    best = (np.maximum if study.directions[0] == "maximize" else np.minimum).accumulate(scores[top])
    return SearchHistory(
        places,
        scores,
        rungs,
        x[[r.number for r in records if r.state == "failed"]],
        budgets,
        # To the end of the search.
        np.append(places[top], x[-1:]) if len(best) else np.array([]),
        np.append(best, best[-1:]),
        by_budget,
    )


def draw_history(data: SearchHistory, words: Words) -> Figure:
    """Scores as points, failed trials as crosses at the bottom, the best so far as a line."""
    figure = Picture(figsize=(10, 4.6), dpi=100, layout="constrained")
    axis = figure.subplots()
    scale = Scale.of(data.scores, words.higher())
    scale.prepare(axis, room_below=len(data.failed_x) > 0)
    colours, named = rung_colours(len(data.budgets)), in_legend(len(data.budgets))
    size = 28 if len(data.x) <= 120 else 14
    for rung, budget in enumerate(data.budgets):
        label = words.budget(budget) if data.by_budget else "trial"
        there = data.rungs == rung
        colour = [colours[rung]] * int(there.sum())
        draw_points(axis, scale, data.x[there], data.scores[there], size, colour, label if rung in named else None)
    if len(data.best):
        where = f"best so far at {words.budget(data.budgets[-1])}" if data.by_budget else "best so far"
        axis.step(data.best_x, data.best, where="post", color=BEST, linewidth=1.8, label=where)
    draw_failed(axis, data.failed_x, "failed (no score)")
    if len(data.x) + len(data.failed_x) == 1:
        axis.set_xlim(-1, 1 + 2 * float(np.append(data.x, data.failed_x)[0]))
    axis.set(
        title="optimisation history",
        xlabel=words.used if data.by_budget else "trial",
        ylabel=words.axis(),
    )
    if not data.by_budget:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25)
    handles = dict(zip(*reversed(axis.get_legend_handles_labels())))
    axis.legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure
