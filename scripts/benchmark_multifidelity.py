"""Races the searchers with rungs against random search on real training: MAML's settings on the bundled glyphs.

Random search trains 30 settings fully, 27 epochs each; successive halving, Hyperband, ASHA and BOHB each have a third
of its epochs. What counts is the
validation accuracy of the best full training, as the searcher sees it; that of its best checkpoint on test tasks, which
no search saw, is the control.

    python scripts/benchmark_multifidelity.py --folder runs/race --workers 2 --json figures.json --plot race.png
    python scripts/benchmark_multifidelity.py --searcher hyperband --seeds 3
    python scripts/benchmark_multifidelity.py --quick

--folder keeps the studies, so that a run that was stopped goes on. The exit status is 1 if the log of any search speaks
against a promoted trial having gone on from its parent's checkpoint. scripts/README.md explains the columns.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from scipy.stats import t as student

from inner_loop.command import Parser
from inner_loop.machine import machine
from metahpo.errors import SearchError
from multifidelity.race import (
    CONTROL,
    QUICK,
    SPACE,
    Found,
    Scale,
    broken_promotions,
    found,
    same_curves,
    search,
    tested,
)

Row = dict[str, Any]
COLUMNS = ("searcher", "seed", "trials", "epochs", "accuracy", "test", "epochs to reach random's")


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    about = machine(["metahpo", "optuna"])
    print(", ".join(f"{key} {value}" for key, value in about.items() if value), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        jobs = [(options.scale, name, seed, folder) for seed in range(options.seeds) for name in options.searcher]
        try:
            in_processes(search, jobs, options.workers)
        except SearchError as error:
            print(f"benchmark_multifidelity.py: {error}", file=sys.stderr)
            return 2
        searches = {(job[1], job[2]): found(*job) for job in jobs}
        won = [(job[0], searches[job[1:3]].best, *job[1:]) for job in jobs if searches[job[1:3]].best]
        tests = dict(zip([job[2:4] for job in won], in_processes(tested, won, options.workers)))
    rows = [row(name, seed, searches, tests.get((name, seed)), options.scale) for name, seed in searches]
    print_rows(rows)
    print_summary(rows, options.scale)
    if options.json:
        content = {"machine": about, "scale": vars(options.scale), "space": SPACE.tree(), "rows": rows}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    if options.plot:
        plot(rows, options.scale, options.plot)
    return 0 if print_promotions(searches) else 1


def parse() -> argparse.Namespace:
    names = list(Scale().searchers())
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 seed, 4 trainings of 4 epochs, to see that all works")
    parser.add_argument("--seeds", type=positive, help="default: 5; with --quick: 1")
    parser.add_argument("--searcher", action="append", choices=names[1:], help="beside random; may be repeated")
    parser.add_argument("--workers", type=positive, default=1, help="searches at a time, each on one thread")
    parser.add_argument("--folder", type=Path, help="keeps the studies here and goes on with them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the best accuracy over epochs here")
    options = parser.parse_args()
    options.searcher = [CONTROL, *dict.fromkeys(options.searcher or names[1:])]
    options.scale = QUICK if options.quick else Scale()
    options.seeds = options.seeds or (1 if options.quick else 5)
    for flag, path in (("--json", options.json), ("--plot", options.plot)):
        if path and not path.absolute().parent.is_dir():
            parser.error(f"{flag} {path}: no such folder")
    return options


def positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def in_processes(function: Any, jobs: list[tuple[Any, ...]], workers: int) -> list[Any]:
    if workers == 1:
        return [function(*job) for job in jobs]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(function, *zip(*jobs)))


def row(name: str, seed: int, searches: dict[tuple[str, int], Found], test: float | None, scale: Scale) -> Row:
    own, control = searches[name, seed], searches[CONTROL, seed]
    accuracies = [other.best.score for other in searches.values() if other.best]
    accuracy = own.best.score if own.best else None
    return {
        "table": "glyphs",
        "searcher": name,
        "seed": seed,
        "evaluations": len(own.trials),
        "regret": None if accuracy is None else max(accuracies) - accuracy,
        "seconds": sum(record.seconds or 0.0 for record in own.trials),
        "epochs": own.epochs,
        "accuracy": accuracy,
        "test_accuracy": test,
        "epochs_to_reach": own.reached(control.best.score) if control.best else None,
        "settings": own.best.settings if own.best else None,
        "curve": own.curve,
    }


def print_rows(rows: list[Row]) -> None:
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for row in rows:
        figures = [f"{row[key]:.4f}" if row[key] is not None else "-" for key in ("accuracy", "test_accuracy")]
        reached = f"{row['epochs_to_reach']:g}" if row["epochs_to_reach"] is not None else "null"
        cells = [row["searcher"], str(row["seed"]), str(row["evaluations"]), f"{row['epochs']:g}", *figures, reached]
        print(f"| {' | '.join(cells)} |")


def print_summary(rows: list[Row], scale: Scale) -> None:
    """Each searcher against random search with all its epochs, and with no more than the searcher's own."""
    by = {(row["searcher"], row["seed"]): row for row in rows}
    seeds = sorted({seed for _, seed in by})
    print(
        f"\nless random search with the same seed, mean ± 95% interval over {len(seeds)} seeds; {scale.budget:g} "
        f"epochs against {scale.epochs * scale.trainings}, or as many:"
    )
    for name in dict.fromkeys(name for name, _ in by if name != CONTROL):
        pairs = [(by[name, seed], by[CONTROL, seed]) for seed in seeds]
        gains = [spread([own[key] - other[key] for own, other in pairs]) for key in ("accuracy", "test_accuracy")]
        equal = spread([own["accuracy"] - at(other["curve"], scale.budget) for own, other in pairs])
        reached = [own["epochs_to_reach"] for own, _ in pairs]
        told = f"reached in {sum(r is not None for r in reached)} of {len(seeds)}"
        if all(r is not None for r in reached):
            told += f", after {median(reached):g} epochs (median)"
        print(f"{name}: accuracy {gains[0]}, test {gains[1]}; at equal epochs {equal}; {told}")


def at(curve: list[tuple[float, float]], epochs: float) -> float:
    """The best accuracy after so many epochs."""
    return max((accuracy for used, accuracy in curve if used <= epochs), default=0.0)


def spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:+.4f}"
    width = student.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"{mean(values):+.4f} ± {width:.4f}"


def print_promotions(searches: dict[tuple[str, int], Found]) -> bool:
    """Whether all promoted trials went on from their parents' checkpoints, by the logs."""
    promoted = compared = same = 0
    broken = []
    for (name, seed), own in searches.items():
        promoted += sum(r.parent is not None and r.state == "complete" for r in own.trials)
        broken += [f"{name}, seed {seed}: {what}" for what in broken_promotions(own.trials)]
        more = same_curves(own.trials, searches[CONTROL, seed].trials)
        compared, same = compared + more[0], same + more[1]
    print(f"\npromoted trials: {promoted}; speaking against one having gone on from its parent: {len(broken)}")
    for line in broken:
        print(f"  {line}")
    print(f"of those whose settings random search trained in one go: {same} of {compared} have its curve bit for bit")
    return not broken and same == compared


def plot(rows: list[Row], scale: Scale, path: Path) -> None:
    """The best full training's accuracy over epochs: mean over seeds, and the band of the standard error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(8, 4.8))
    for i, name in enumerate(dict.fromkeys(row["searcher"] for row in rows)):
        curves = [row["curve"] for row in rows if row["searcher"] == name and row["curve"]]
        if not curves:
            continue
        end = scale.epochs * scale.trainings if name == CONTROL else scale.budget
        # From where all of them have a full training.
        epochs = np.unique([max(c[0][0] for c in curves), *(e for c in curves for e, _ in c), end])
        epochs = epochs[epochs >= max(c[0][0] for c in curves)]
        values = np.array([[at(curve, e) for e in epochs] for curve in curves])
        middle, error = values.mean(0), values.std(0, ddof=min(1, len(curves) - 1)) / len(curves) ** 0.5
        color = "0.35" if name == CONTROL else f"C{i - 1}"
        axes.step(epochs, middle, where="post", color=color, lw=1.8, label=name)
        axes.fill_between(epochs, middle - error, middle + error, step="post", color=color, alpha=0.15, lw=0)
        if name == CONTROL:
            axes.axhline(middle[-1], color=color, lw=0.8, ls=":")
    axes.axvline(scale.budget, color="0.7", lw=0.8, ls="--")
    axes.set(xlabel="epochs trained in all", ylabel="validation accuracy of the best full training")
    axes.set_title("5-way 1-shot glyphs: MAML's settings searched", fontsize=11)
    axes.legend(loc="lower right", frameon=False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
