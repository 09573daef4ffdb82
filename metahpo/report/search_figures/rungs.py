"""Rung survival: learning curves over the rungs of a multi-fidelity search."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from metahpo.picture import Picture
from metahpo.report.search_figures.looks import (
    BEST,
    Scale,
    Words,
    budget_of,
    budgets_of,
    counted,
    in_legend,
    rung_colours,
)
from metahpo.searchers.base import Proposal
from metahpo.searchers.records import TrialRecord
from metahpo.searchers.study import Study


@dataclass(frozen=True)
class Curve:
    """The reports of a trial and those it went on from: steps [S], scores [S]; rung: the last one reached, as a place
    in ``Rungs.budgets``; number: of the last trial."""

    number: int
    rung: int
    steps: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Rung:
    """trials: with that budget; promoted: of these, gone on from; best: the best score or None; used: the training that
    they added."""

    budget: float
    trials: int
    failed: int
    promoted: int
    best: float | None
    used: float


@dataclass(frozen=True)
class Rungs:
    """curves: one for each trial that none went on from; by_report: whether they are of reports, not of last scores;
    same_unit: whether reports count what budgets count."""

    rungs: tuple[Rung, ...]
    curves: tuple[Curve, ...]
    budgets: tuple[float, ...]
    best: int | None
    by_report: bool
    same_unit: bool


def rungs(study: Study) -> Rungs:
    """The rungs of a study, by the first objective; without reports a curve is the scores by budget.

    Reports that are not finite are left out.
    """
    records = study.trials
    budgets, parents = budgets_of(records), {r.parent for r in records}
    by_report = any(r.reports for r in records)
    curves = []
    for record in records:
        if record.number in parents:
            continue
        points: dict[float, float] = {}
        for each in _line(record, records):
            points |= {**each.reports} if by_report else _end(each)
        kept = {step: score for step, score in sorted(points.items()) if math.isfinite(score) and math.isfinite(step)}
        curve = Curve(
            record.number, budgets.index(budget_of(record)), np.array(list(kept)), np.array(list(kept.values()))
        )
        curves.append(curve)
    best = study.best
    return Rungs(
        tuple(_rung(study, budget, parents) for budget in budgets),
        tuple(curves),
        budgets,
        None if best is None else best.number,
        by_report,
        not by_report or all(_counts_budget(r) for r in records if r.state == "complete" and r.reports),
    )


def rungs_table(data: Rungs, words: Words) -> str:
    """A markdown table, one row a rung, the largest budget first."""
    lines = ["| rung | trials | failed | promoted | best score | training added |", "| --- |" + " ---: |" * 5]
    for rung in reversed(data.rungs):
        best = "–" if rung.best is None else f"{rung.best:.5g}"
        used = "–" if math.isinf(rung.used) or math.isinf(rung.budget) else f"{rung.used:g}"
        lines.append(
            f"| {words.budget(rung.budget)} | {rung.trials} | {rung.failed} | {rung.promoted} | {best} | {used} |"
        )
    return "\n".join(lines)


def draw_rungs(data: Rungs, words: Words) -> Figure:
    """The curves, those that came further darker and over the others."""
    figure = Picture(figsize=(10, 4.8), dpi=100, layout="constrained")
    axis = figure.subplots()
    scale = Scale.of((score for curve in data.curves for score in curve.scores), words.higher())
    scale.prepare(axis)
    colours, named = rung_colours(len(data.budgets)), in_legend(len(data.budgets))
    levels = [budget for budget in data.budgets if math.isfinite(budget)] if data.same_unit else []
    for level in levels:
        axis.axvline(level, color="0.85", linewidth=0.8, zorder=0)
    for curve in sorted(data.curves, key=lambda curve: (curve.rung, curve.number == data.best)):
        best = curve.number == data.best
        axis.plot(
            curve.steps,
            scale.clip(curve.scores),
            color=BEST if best else colours[curve.rung],
            linewidth=1.8 if best else 1.0,
            marker="o" if len(curve.steps) == 1 or not data.by_report else None,
            markersize=4,
            alpha=0.9,
        )
    for rung in named:
        reached = counted(sum(curve.rung == rung for curve in data.curves), "trial")
        label = f"to {words.budget(data.budgets[rung])} ({reached})"
        axis.plot([], [], color=colours[rung], label=label)
    if data.best is not None:
        axis.plot([], [], color=BEST, linewidth=1.8, label=f"best (trial {data.best})")
    steps = np.concatenate([curve.steps for curve in data.curves]) if data.curves else np.array([])
    if len(steps) and steps.min() > 0 and len(levels) > 2 and levels[-1] >= 8 * levels[0]:
        axis.set_xscale("log")
        shown = [levels[i] for i in in_legend(len(levels))]
        axis.set_xticks(shown, [f"{level:.4g}" for level in shown])
        axis.minorticks_off()
    label = {"epochs": "epoch", "data": "fraction of the data"}.get(words.unit, words.unit)
    if not data.same_unit:
        label = "step of the report" if words.unit == "budget" else "epoch"
    axis.set(title="how far each trial came", xlabel=label, ylabel=words.axis())
    axis.grid(axis="y", alpha=0.25)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _line(record: TrialRecord, records: list[TrialRecord]) -> list[TrialRecord]:
    """The trial after those it went on from, the first one first."""
    line = [record]
    while line[-1].parent is not None:
        line.append(records[line[-1].parent])
    return line[::-1]


def _counts_budget(record: TrialRecord) -> bool:
    """Whether the last step reported is the budget; steps may count from 0."""
    return record.budget is not None and abs(max(record.reports) - record.budget) <= 1


def _end(record: TrialRecord) -> dict[float, float]:
    return {} if record.score is None else {budget_of(record): record.score}


def _rung(study: Study, budget: float, parents: set[int | None]) -> Rung:
    there = [r for r in study.trials if budget_of(r) == budget]
    scores = [r.score for r in there if r.score is not None]
    choose = max if study.directions[0] == "maximize" else min
    return Rung(
        budget,
        len(there),
        sum(r.state == "failed" for r in there),
        sum(r.number in parents for r in there),
        choose(scores, default=None),
        sum(study.duration(Proposal(r.settings, r.budget, r.parent)) for r in there),
    )
