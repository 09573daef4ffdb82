"""Learning rates by layer and phase, learnt by gradient, against the best single rate of a grid.

python scripts/prove_rates.py [--quick] [--seeds 5] [--json FILE] [--picture FILE.png] [--net residual_mlp|small_resnet]

A small residual net on scikit-learn's digits, 100 steps of SGD with momentum 0.9 on batches of 50. For each seed: rates
and momenta are tuned on the training and validation data, then nets with new initial weights are trained by plain
torch.optim: with what was learnt, and with each of 12 single rates (0.003 to 1). All get the same initial weights,
batches and number of steps. The grid's best is chosen by the validation loss of the same nets; "by test" is the rate of
highest test accuracy, which no one could have chosen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from inner_loop.machine import machine
from metahpo.nets import ResidualMLP, SmallResNet
from metahpo.training.environment import seeded
from metahpo.training.metrics import Row
from metahpo.tuning import Rates, load_digits
from metahpo.tuning.base import test
from metahpo.tuning.data import Loader
from metahpo.tuning.rates import RatesSettings, RatesTuner

NETS = {"residual_mlp": ResidualMLP, "small_resnet": lambda *shape: SmallResNet(*shape, width=8)}
GRID = torch.logspace(-2.5, 0, 12).tolist()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: some seconds")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--net", choices=NETS, default="residual_mlp")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--picture", type=Path, help="draw the first seed's rates here")
    options = parser.parse_args()
    settings = {"steps": 100, "iterations": 60, "tune": ("lr", "momentum"), "remat": "none"}
    if options.quick:
        settings |= {"steps": 20, "iterations": 4, "outer_lr": 0.3}
    rows, first = [], None
    for seed in range(1 if options.quick else options.seeds):
        row, rates = one_seed(seed, options.net, settings, runs=1 if options.quick else 3)
        rows.append(row)
        first = first or rates
        print(", ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    for key in ("tuned", "grid", "grid_by_test", "initial"):
        found = [row[f"{key}_accuracy"] for row in rows]
        deviation = f" ± {statistics.stdev(found):.2%}" if len(found) > 1 else ""
        print(f"{key:14} test accuracy {statistics.mean(found):.2%}{deviation} (deviation over {len(found)} seeds)")
    assert first
    print(f"learnt with seed 0:\n{first.table()}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine([]), "rows": rows}, indent=2))
    if options.picture:
        first.heat_map().savefig(options.picture)
    return 0


def one_seed(seed: int, name: str, settings: dict, runs: int) -> tuple[Row, Rates]:
    """The figures of one seed, which draws the split of the data too, and the rates learnt."""
    data = load_digits(seed=seed)
    with seeded(seed):
        net = NETS[name]((1, 8, 8), 10)

    def tuner(**more) -> RatesTuner:
        chosen = RatesSettings.of(**{**settings, "seed": seed, **more})
        return RatesTuner(net, F.cross_entropy, Loader(data["train"], chosen.batch), Loader(data["val"], 300), chosen)

    def trained(rates: Rates) -> dict[str, Row]:
        """Means over the runs, on validation and test data."""
        nets = [judge.train_with(rates, run) for run in range(runs)]
        rows = {part: [test(net, F.cross_entropy, *data[part]) for net in nets] for part in ("val", "test")}
        return {part: {key: statistics.mean(r[key] for r in rs) for key in rs[0]} for part, rs in rows.items()}

    judge = tuner()
    started = time.perf_counter()
    learnt = judge.run()
    seconds = time.perf_counter() - started
    # Constants that diverge have no validation loss, and are not chosen.
    grid = {lr: trained(tuner(lr=lr).result()) for lr in GRID}
    finite = {lr: figures for lr, figures in grid.items() if figures["val"]["loss"] < float("inf")}
    best = min(finite, key=lambda lr: finite[lr]["val"]["loss"])
    luckiest = max(finite, key=lambda lr: finite[lr]["test"]["accuracy"])
    found, initial = trained(learnt)["test"], trained(tuner().result())["test"]
    return {
        "seed": seed,
        "tuned_accuracy": found["accuracy"],
        "grid_accuracy": grid[best]["test"]["accuracy"],
        "grid_by_test_accuracy": grid[luckiest]["test"]["accuracy"],
        "initial_accuracy": initial["accuracy"],
        "tuned_loss": found["loss"],
        "grid_loss": grid[best]["test"]["loss"],
        "grid_lr": best,
        "seconds": seconds,
    }, learnt


if __name__ == "__main__":
    sys.exit(main())
