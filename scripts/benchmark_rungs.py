"""ASHA whose new settings come from the Bayesian searcher, beside one that may repeat settings, and random ones.

A pair is one seed: the same table and the same noise for all. The table has 4 settings of 6 values each (1,296 in all)
and a closed form: a quadratic with one interaction, whose optimum the seed draws, plus what is left to learn after so
many epochs. Four imagined workers train until they have spent the epochs of 16 full trainings, as fast as one another.

"may repeat" takes the base's first answer and tells it nothing of the settings of other budgets. The exit status is 1
if "never repeats" repeats settings, or if its loss is worse by more than luck (paired t, one-sided, p < 0.05).

    python scripts/benchmark_rungs.py --pairs 30 --json figures.json
    python scripts/benchmark_rungs.py --quick
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from inner_loop.command import Parser
from inner_loop.machine import machine
from metahpo.searchers import ASHA, Bayesian, History, Int, Observation, Proposal, Random, Space

VALUES, SETTINGS, WORKERS, NOISE = 6, 4, 4, 0.02
COLUMNS = ("new settings", "loss", "settings begun", "of them repeats", "full trainings")
SPACE = Space({f"x{i}": Int(0, VALUES - 1) for i in range(SETTINGS)})
Row = dict[str, Any]


@dataclass(frozen=True)
class MayRepeat(ASHA):
    """The control: the base's first answer, whatever is known of it."""

    def _new(self, history: History, space: Space, rng: np.random.Generator) -> Proposal | None:
        return Proposal(self.base.suggest(History(list(self.view(history, space))), space, rng))


SEARCHERS = {
    "never repeats": ASHA(base=Bayesian()),
    "may repeat": MayRepeat(base=Bayesian()),
    "random": ASHA(base=Random()),
}


class Table:
    """Losses of all settings, drawn by a seed."""

    def __init__(self, seed: int):
        rng = np.random.default_rng([seed, 0])
        self.seed = seed
        self.best = rng.integers(0, VALUES, SETTINGS)
        self.weights = rng.uniform(0.2, 1.0, SETTINGS)
        self.interaction = rng.uniform(-0.3, 0.3)

    def final(self, settings: dict[str, int]) -> float:
        """The loss after the longest training, without noise; the best one is 0."""
        away = (np.array(list(settings.values())) - self.best) / (VALUES - 1)
        return float(self.weights @ away**2 + self.interaction * away[0] * away[1])

    def loss(self, settings: dict[str, int], budget: float) -> float:
        """After so many epochs, with noise that the same settings and budget always have."""
        noise = np.random.default_rng([self.seed, 1, *settings.values(), round(budget)]).normal()
        return self.final(settings) + 0.3 / budget + NOISE * noise


def search(name: str, seed: int, trainings: int) -> Row:
    """The loss of the settings with the best full training, how many trials began, and how many of them repeated."""
    searcher, table, rng = SEARCHERS[name], Table(seed), np.random.default_rng([seed, 2])
    trials: list[Observation] = []
    running: list[tuple[float, int]] = []
    left, now, begun, repeats = trainings * searcher.max_budget, 0.0, set(), 0
    while left > 0 or running:
        while left > 0 and len(running) < WORKERS:
            proposal = searcher.suggest(History(trials), SPACE, rng)
            epochs = proposal.budget - (0 if proposal.parent is None else trials[proposal.parent].budget)
            settings = tuple(proposal.settings.values())
            if proposal.parent is None:
                repeats += settings in begun
                begun.add(settings)
            trials.append(
                Observation(
                    len(trials),
                    proposal.settings,
                    "pending",
                    budget=proposal.budget,
                    parent=proposal.parent,
                    notes=proposal.notes,
                )
            )
            heapq.heappush(running, (now + epochs, len(trials) - 1))
            left -= epochs
        now, number = heapq.heappop(running)
        ended = trials[number]
        loss = table.loss(ended.settings, ended.budget)
        trials[number] = Observation(
            number, ended.settings, "complete", (loss,), ended.budget, ended.parent, ended.notes
        )
    full = [trial for trial in trials if trial.budget == searcher.max_budget]
    best = min(full, key=lambda trial: trial.loss)
    started = sum(trial.parent is None for trial in trials)
    return {
        "searcher": name,
        "seed": seed,
        "loss": table.final(best.settings),
        "begun": started,
        "repeats": repeats,
        "full": len(full),
    }


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30, help="seeds")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--trainings", type=int, default=16, help="full trainings whose epochs a search may spend")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes machine and rows")
    parser.add_argument("--quick", action="store_true", help="2 pairs of 4 trainings")
    options = parser.parse_args()
    if options.quick:
        options.pairs, options.trainings = 2, 4
    if options.pairs < 2 or options.trainings < 4 or options.first_seed < 0:
        parser.error("--pairs should be at least 2, --trainings at least 4 and --first-seed at least 0")
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: no such folder")
    torch.set_num_threads(1)
    seeds = range(options.first_seed, options.first_seed + options.pairs)
    jobs = [(name, seed) for seed in seeds for name in SEARCHERS]
    rows = [search(name, seed, options.trainings) for name, seed in tqdm(jobs, unit="search", disable=None)]
    kept = told(rows)
    if options.json:
        content = {"machine": machine(["metahpo", "botorch"]), "rows": rows, "promises": kept}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(kept.values()) else 1


def told(rows: list[Row]) -> dict[str, bool]:
    """Prints the figures; which promises they keep."""
    by = {name: [row for row in rows if row["searcher"] == name] for name in SEARCHERS}
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for name, own in by.items():
        cells = [f"{mean(row[key] for row in own):.1f}" for key in ("begun", "repeats", "full")]
        print(f"| {name} | {interval([row['loss'] for row in own])} | {' | '.join(cells)} |")
    losses = {name: np.array([row["loss"] for row in own]) for name, own in by.items()}
    p = 1.0
    for other in list(by)[1:]:
        less = losses["never repeats"] - losses[other]
        # Where all pairs are equal there is no t.
        worse = float(stats.ttest_1samp(less, 0, alternative="greater").pvalue) if less.any() else 1.0
        better, equal = int((less < 0).sum()), int((less == 0).sum())
        counts = f"better, equal, worse in {better}, {equal}, {len(less) - better - equal} of {len(less)} pairs"
        print(f"never repeats less {other}: {interval(less.tolist())}, {counts}; that it is worse has p = {worse:.2g}")
        p = min(p, worse)
    promises = {
        "no settings are begun twice": not any(row["repeats"] for row in by["never repeats"]),
        "the loss is not worse by more than luck": p >= 0.05,
    }
    for text, kept in promises.items():
        print(f"{'ok  ' if kept else 'FAIL'} {text}")
    return promises


def interval(values: list[float]) -> str:
    """Mean and 95% interval."""
    width = stats.t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"{mean(values):.4f} ± {width:.4f}"


if __name__ == "__main__":
    sys.exit(main())
