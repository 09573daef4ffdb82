"""Gradient search against random search at equal time: learning rate and weight decay of trainings on real digits.

python scripts/benchmark_gradient_search.py [--quick] [--table one|layers] [--searcher NAME] [--seeds N] [--clock cpu]
                                            [--json FILE] [--plot FILE.png]

Table `one` is a net with one rate and one decay, table `layers` a residual net with a rate and a decay for each layer.
Each run has the same seconds on one thread, for its trials and its own thoughts; random search and the others without
gradients train plainly, and pay for none. Of a seed's runs the one that has used the least time goes on with its next
trial, so whatever else the machine does hits all alike. A seed draws the data's split, initial weights, batches and
trials. The regret is the validation loss of a run's best trial less the least that any of the seed's runs has found;
the test loss is that of the same trained net on data that no run has seen. scripts/README.md explains the columns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
import torch.nn.functional as F
from scipy.stats import wilcoxon

from inner_loop.command import Parser
from inner_loop.machine import machine
from metahpo.errors import NonFiniteError
from metahpo.inner import SGD
from metahpo.nets import MLP, ResidualMLP
from metahpo.searchers import (
    TPE,
    Bayesian,
    Float,
    Gradient,
    History,
    HypergradientObjective,
    Observation,
    Outcome,
    Proposal,
    Random,
    Searcher,
    Space,
)
from metahpo.training.environment import seeded
from metahpo.tuning import Labelled, load_digits
from metahpo.tuning.base import test

SEARCHERS: dict[str, Searcher] = {"random": Random(), "gradient": Gradient(), "tpe": TPE(), "bayesian": Bayesian()}
COLUMNS = ("table", "searcher", "seed", "trials", "failed", "val loss", "regret", "test loss", "test accuracy", "s")
MEASURES = ("val_loss", "regret", "test_loss", "test_accuracy")
RATE, DECAY = Float(1e-4, 1, log=True), Float(1e-6, 1e-1, log=True)


@dataclass(frozen=True)
class Table:
    """A training; seconds: of each run; by_layer: whether each layer has a rate and a decay of its own."""

    net: Callable[[], torch.nn.Module]
    seconds: float
    by_layer: bool = False
    steps: int = 100

    def objective(
        self, seed: int, data: dict[str, Labelled], gradients: bool, batch: int = 100
    ) -> HypergradientObjective:
        with seeded(seed):
            net = self.net()
        rule = SGD(0.1, momentum=0.9, weight_decay=1e-4)
        falling = [1 - step / self.steps for step in range(self.steps)]
        options: dict[str, Any] = {"steps": self.steps, "schedule": falling, "batch": batch, "gradients": gradients}
        return HypergradientObjective(net, F.cross_entropy, data["train"], data["val"], rule, seed=seed, **options)

    def space(self) -> Space:
        layers = dict.fromkeys(name.rpartition(".")[0] for name, _ in self.net().named_parameters())
        parts = [f".{layer}" for layer in layers] if self.by_layer else [""]
        return Space({f"{name}{part}": of for part in parts for name, of in (("lr", RATE), ("weight_decay", DECAY))})


TABLES = {
    "one": Table(lambda: MLP((1, 8, 8), 10, (32,)), seconds=5),
    "layers": Table(lambda: ResidualMLP((1, 8, 8), 10), seconds=10, by_layer=True),
}


@dataclass
class Run:
    """A search, a trial at a time. course: (seconds so far, the best loss so far) after each trial."""

    searcher: Searcher
    objective: HypergradientObjective
    space: Space
    seed: int
    clock: Callable[[], float]
    trials: list[Observation] = field(default_factory=list)
    course: list[tuple[float, float]] = field(default_factory=list)
    seconds: float = 0.0

    def step(self) -> None:
        started, number = self.clock(), len(self.trials)
        given = self.searcher.suggest(History(self.trials), self.space, np.random.default_rng([self.seed, number]))
        assert given is not None
        proposal = given if isinstance(given, Proposal) else Proposal(given)
        try:
            outcome = self.objective.outcome(proposal.settings)
        except NonFiniteError:
            outcome = Outcome(float("nan"))
        losses = (outcome.score,) if np.isfinite(outcome.score) else None  # type: ignore[arg-type]
        state = "complete" if losses else "failed"
        gradients, notes = dict(outcome.gradients), proposal.notes
        self.trials.append(
            Observation(number, proposal.settings, state, losses, notes=notes, gradients=gradients)  # type: ignore[arg-type]
        )
        self.seconds += self.clock() - started
        self.course.append((self.seconds, min((o.loss for o in self.trials if o.loss is not None), default=np.inf)))

    @property
    def best(self) -> Observation:
        return min((o for o in self.trials if o.loss is not None), key=lambda o: o.loss or 0.0)


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    about = machine(["metahpo", "scikit-learn", "scipy", "botorch"]) | {"clock": options.clock}
    print(", ".join(f"{key} {value}" for key, value in about.items() if value))
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS), flush=True)
    rows: list[dict[str, Any]] = []
    for name in options.table:
        for seed in range(options.seeds):
            rows += one_seed(name, seed, options)
            if options.json:
                options.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")
        summary(name, [row for row in rows if row["table"] == name])
    if options.plot:
        plot(rows, options.plot)
    return 0


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, random and gradient search, 0.15 s each")
    parser.add_argument("--table", action="append", choices=TABLES, help="only this one; may be repeated")
    parser.add_argument("--searcher", action="append", choices=SEARCHERS, help="only this one; may be repeated")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--seconds", type=float, help="of each run (default: 5 for one, 10 for layers)")
    parser.add_argument("--batch", type=int, default=100, help="training examples a step; the fewer the rougher a loss")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="what is equal; cpu: on a machine that others use too"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the loss over the seconds here")
    options = parser.parse_args()
    options.table = options.table or list(TABLES)
    options.searcher = options.searcher or (["random", "gradient"] if options.quick else list(SEARCHERS))
    if options.quick:
        options.seeds, options.seconds = 1, options.seconds or 0.15
    if options.seeds < 1 or (options.seconds is not None and options.seconds <= 0):
        parser.error(
            f"--seeds and --seconds: expected at least 1 and above 0, found {options.seeds}, {options.seconds}"
        )
    for flag, path in (("--json", options.json), ("--plot", options.plot)):
        if path and not path.absolute().parent.is_dir():
            parser.error(f"{flag} {path}: no such folder")
    return options


def one_seed(name: str, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one seed: its searchers' runs, side by side."""
    table = TABLES[name]
    data, space = load_digits((300, 300, 1197), seed), table.space()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    limit = options.seconds or table.seconds
    # Each begins in turn.
    order = sorted(options.searcher, key=lambda own: (options.searcher.index(own) + seed) % len(options.searcher))
    runs = {}
    for own in order:
        objective = table.objective(seed, data, own == "gradient", options.batch)
        warm_up(SEARCHERS[own], objective, space)
        runs[own] = Run(SEARCHERS[own], objective, space, seed, clock)
    while unfinished := [run for run in runs.values() if run.seconds < limit]:
        min(unfinished, key=lambda run: run.seconds).step()
    for run in runs.values():
        # The last one has ended too late, unless it is all there is.
        del run.trials[max(1, sum(at <= limit for at, _ in run.course)) :], run.course[len(run.trials) :]
    least = min(run.course[-1][1] for run in runs.values())
    return [row(name, own, seed, runs[own], least, data["test"]) for own in options.searcher]


def warm_up(searcher: Searcher, objective: HypergradientObjective, space: Space) -> None:
    """Imports and first calls, which no run should pay for."""
    rng = np.random.default_rng(0)
    seen = [Observation(i, space.sample(rng), "complete", (float(i),)) for i in range(20)]
    searcher.suggest(History(seen), space, rng)
    objective.outcome(space.decode(np.full(len(space), 0.5)))


def row(table: str, searcher: str, seed: int, run: Run, least: float, data: Labelled) -> dict[str, Any]:
    best = run.best
    tested = test(run.objective.fitted(best.settings), F.cross_entropy, *data)
    found = {
        "table": table,
        "searcher": searcher,
        "seed": seed,
        "evaluations": len(run.trials),
        "failed": sum(o.state == "failed" for o in run.trials),
        "val_loss": best.loss,
        "regret": (best.loss or 0.0) - least,
        "test_loss": tested["loss"],
        "test_accuracy": tested["accuracy"],
        "seconds": run.seconds,
        "best": best.settings,
        "course": [list(point) for i, point in enumerate(run.course) if i == 0 or point[1] < run.course[i - 1][1]],
    }
    numbers = [f"{found[key]:.4f}" for key in MEASURES]
    cells = [table, searcher, str(seed), str(found["evaluations"]), str(found["failed"]), *numbers]
    print("| " + " | ".join([*cells, f"{run.seconds:.1f}"]) + " |", flush=True)
    return found


def summary(name: str, rows: list[dict[str, Any]]) -> None:
    """Means by searcher, and each against gradient search on the same seeds."""
    by = {own: [r for r in rows if r["searcher"] == own] for own in dict.fromkeys(r["searcher"] for r in rows)}
    print(f"\n{name}, means over {len(next(iter(by.values())))} seeds:")
    for own, found in by.items():
        means = {key: statistics.mean(r[key] for r in found) for key in ("evaluations", *MEASURES)}
        print(f"  {own:9} " + ", ".join(f"{key} {value:.4g}" for key, value in means.items()))
    for own, found in by.items():
        if own == "gradient" or "gradient" not in by:
            continue
        for key in ("val_loss", "test_loss"):
            gains = [r[key] - g[key] for r, g in zip(found, by["gradient"])]
            p = wilcoxon(gains).pvalue if len(gains) > 5 and any(gains) else float("nan")
            print(
                f"  gradient below {own} in {key}: {statistics.mean(gains):+.4f}, with {sum(g > 0 for g in gains)} of "
                f"{len(gains)} seeds, p {p:.4f} (Wilcoxon, two-sided)"
            )
        times = [reached(g["course"], r["val_loss"]) / r["seconds"] for r, g in zip(found, by["gradient"])]
        print(f"  gradient is where {own} ends after {statistics.median(times):.0%} of the time (median)")
    print()


def reached(course: list[list[float]], loss: float) -> float:
    """When a run had such a loss; infinity: never."""
    return min((at for at, best in course if best <= loss), default=float("inf"))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """The regret over the seconds, a panel for each table: the median of the seeds and the middle half of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r["table"] for r in rows))
    figure, panels = plt.subplots(1, len(names), figsize=(5.5 * len(names), 4.2), squeeze=False)
    for name, axes in zip(names, panels[0]):
        mine = [r for r in rows if r["table"] == name]
        grid = np.linspace(0, max(r["seconds"] for r in mine), 200)[1:]
        for i, own in enumerate(dict.fromkeys(r["searcher"] for r in mine)):
            found = [r for r in mine if r["searcher"] == own]
            least = [r["val_loss"] - r["regret"] for r in found]
            curves = np.array([[best_at(r["course"], at) for at in grid] for r in found]) - np.array(least)[:, None]
            low, middle, high = np.percentile(curves, [25, 50, 75], axis=0, method="nearest")
            axes.plot(grid, middle, label=own, color=f"C{i}")
            axes.fill_between(grid, low, high, alpha=0.15, color=f"C{i}", lw=0)
        axes.set(yscale="log", xlabel="seconds on one thread", ylabel="validation loss above the best", title=name)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def best_at(course: list[list[float]], seconds: float) -> float:
    return min((best for at, best in course if at <= seconds), default=float("inf"))


if __name__ == "__main__":
    sys.exit(main())
