"""Importance: the share of the scores' variance that each setting explains."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import optuna
from matplotlib.figure import Figure
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from scipy.stats import rankdata

from metahpo.picture import Picture
from metahpo.report.search_figures.looks import Words, budget_of, is_multi_fidelity, rung_colours
from metahpo.report.search_figures.ticks import short
from metahpo.searchers.records import TrialRecord
from metahpo.searchers.settings import Choice
from metahpo.searchers.space import Space
from metahpo.searchers.study import Study

FEWEST_TRIALS = 10
RESAMPLES, TREES = 20, 8
# In each resample, for the time of fANOVA grows with it: a few seconds.
MOST_TRIALS = 150


@dataclass(frozen=True)
class Importance:
    """Of each setting [D], the most important first: its mean share over the resamples, which sum to 1, and the
    interval from ``low`` to ``high`` that nine in ten resamples lie in. budget: of the trials that were looked at."""

    names: tuple[str, ...]
    shares: np.ndarray
    low: np.ndarray
    high: np.ndarray
    trials: int
    budget: float | None


def importance(study: Study) -> Importance | str:
    """The importance of each setting for the first objective, or a sentence that says why there is none.

    Functional ANOVA over a random forest (Hutter, Hoos and Leyton-Brown 2014) by Optuna, in the unit cube, of the
    scores' ranks, so that neither a diverged trial nor the choice between a loss and its logarithm matters. A setting
    that does not exist in a trial is given a value at random, for any makes no difference. In a multi-fidelity search
    the trials of one budget are looked at, the one with the most.
    """
    complete = [r for r in study.trials if r.state == "complete"]
    groups: dict[float, list[TrialRecord]] = {}
    for record in complete:
        groups.setdefault(budget_of(record), []).append(record)
    by_budget = is_multi_fidelity(complete)
    budget, group = max(groups.items(), key=lambda item: (len(item[1]), item[0]), default=(0.0, []))
    if len(group) < FEWEST_TRIALS:
        where = " of one budget" if by_budget else ""
        return f"The importance of the settings needs {FEWEST_TRIALS} complete trials{where}; there are {len(group)}."
    scores = np.array([r.score for r in group], dtype=float)
    if np.ptp(scores) == 0:
        return "All scores are the same, so no setting is more important than another."
    shares = _resampled(study.space, group, rankdata(scores), np.random.default_rng(study.seed))
    order = np.argsort(-shares.mean(0), kind="stable")
    low, high = np.quantile(shares[:, order], (0.05, 0.95), axis=0)
    names = list(study.space)
    return Importance(
        tuple(names[i] for i in order),
        shares.mean(0)[order],
        low,
        high,
        len(group),
        budget if by_budget else None,
    )


def draw_importance(data: Importance, words: Words) -> Figure:
    """A bar a setting with its interval."""
    count = len(data.names)
    figure = Picture(figsize=(9, 1.5 + 0.36 * count), dpi=100, layout="constrained")
    axis = figure.subplots()
    places = np.arange(count)[::-1]
    axis.barh(places, data.shares, 0.62, color=rung_colours(1)[0])
    # The mean of few skewed numbers may lie a little outside.
    reach = [np.maximum(data.shares - data.low, 0), np.maximum(data.high - data.shares, 0)]
    axis.errorbar(data.shares, places, xerr=reach, fmt="none", color="0.15", capsize=3, linewidth=1.2)
    for place, share, high in zip(places, data.shares, data.high):
        axis.text(max(share, high) + 0.012, place, f"{share:.0%}", va="center", fontsize=8)
    axis.set_yticks(places, [short(name) for name in data.names], fontsize=9)
    where = "" if data.budget is None else f" of {words.budget(data.budget)}"
    axis.set(
        title=f"importance for {words.objectives[0]}, by {data.trials} trials{where}",
        xlabel="share of the variance of the scores' ranks; lines: 90% of the resamples",
        xlim=(0, 1.1),
        ylim=(-0.6, count - 0.4),
    )
    axis.set_xticks(np.linspace(0, 1, 6), [f"{share:.0%}" for share in np.linspace(0, 1, 6)])
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    return figure


def _resampled(
    space: Space, records: Sequence[TrialRecord], scores: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The shares [R, D] by trials drawn with replacement; draws whose scores are all the same are left out."""
    points = np.array([space.encode(r.settings, missing=np.nan) for r in records])
    found = []
    for resample in range(RESAMPLES):
        chosen = rng.integers(len(records), size=min(len(records), MOST_TRIALS))
        filled = np.where(np.isnan(points), rng.random(points.shape), points)
        # A forest whose every tree got one score alone says nothing.
        with suppress(RuntimeError):
            if np.ptp(scores[chosen]) > 0:
                found.append(_shares(space, filled[chosen], scores[chosen], resample))
    return np.array(found)


def _shares(space: Space, points: np.ndarray, scores: np.ndarray, seed: int) -> np.ndarray:
    distributions = {name: _distribution(setting) for name, setting in space.settings.items()}
    study = optuna.create_study()
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={
                    name: setting.index(setting.at(unit)) if isinstance(setting, Choice) else float(unit)
                    for (name, setting), unit in zip(space.settings.items(), point)
                },
                distributions=distributions,
                value=float(score),
            )
            for point, score in zip(points, scores)
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(n_trees=TREES, seed=seed))
    return np.array([found[name] for name in space])


def _distribution(setting: object) -> BaseDistribution:
    if isinstance(setting, Choice):
        return CategoricalDistribution(range(len(setting.options)))
    return FloatDistribution(0.0, 1.0)
