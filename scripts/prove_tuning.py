"""What ``tune_decay`` and ``clean`` promise, measured on scikit-learn's digits.

decay:   one decay a parameter of a net of over a million, beside the best single decay of a grid of 10
overfit: 50 validation digits fitted to 100% by the decays alone, one a parameter
clean:   0 to 50% of the training labels wrong: which are found, and what training without them is worth, beside
         other rules; also on two other data sets and with mistakes of one kind
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from inner_loop.machine import machine
from metahpo.nets import MLP
from metahpo.training.environment import seeded
from metahpo.tuning.data import Labelled, Loader, load_digits
from metahpo.tuning.decay import DecayTuner
from metahpo.tuning.settings import DecaySettings
from tunings.cleaning import prove_clean, tell_clean
from tunings.figures import Row, score, spread

DIGITS = 1797


def prove_decay(quick: bool, seeds: int) -> list[Row]:
    """Trainings of equal steps, batches and initial weights, in turn: a grid of single decays, one decay a parameter,
    and the best single decay trained on training and validation data together."""
    train_size, val_size, width, steps = (60, 60, 16, 40) if quick else (100, 500, 1000, 200)
    grid = torch.logspace(-5, -1, 3 if quick else 10, dtype=torch.float64).tolist()
    settings = {"by": "parameter", "steps": steps, "every": 5, "val_batch": 200, "decay_lr": 1.0}
    rows: list[Row] = []
    for seed in range(seeds):
        data = load_digits((train_size, val_size, DIGITS - train_size - val_size), seed)
        with seeded(seed):
            net = MLP((1, 8, 8), 10, (width, width))
        chosen = DecaySettings.of(seed=seed, **settings)

        def add(name: str, found: nn.Module, seconds: float, decay: float | None, seed=seed, data=data) -> Row:
            scores = {f"{part}_{key}": v for part in ("val", "test") for key, v in score(found, data[part]).items()}
            rows.append({"what": "decay", "name": name, "seed": seed, "decay": decay, "seconds": seconds, **scores})
            return rows[-1]

        ordinary(net, data["train"], 0.0, chosen, 3)  # What is loaded at first use is not timed.
        singles = [add("single", *ordinary(net, data["train"], decay, chosen), decay) for decay in grid]
        started = time.perf_counter()
        found = DecayTuner(net, F.cross_entropy, data["train"], data["val"], chosen).run()
        add("by parameter", found.net, time.perf_counter() - started, None)  # type: ignore[attr-defined]
        best = min(singles, key=lambda row: row["val_loss"])["decay"]
        both = Labelled(*(torch.cat(pair) for pair in zip(data["train"], data["val"])))
        add("best single, train + val", *ordinary(net, both, best, chosen), best)
    return rows


def tell_decay(rows: list[Row]) -> None:
    by_seed = [[row for row in rows if row["seed"] == seed] for seed in sorted({row["seed"] for row in rows})]
    singles = [[row for row in own if row["name"] == "single"] for own in by_seed]
    ways: dict[str, list[Row]] = {
        "one decay a parameter": [row for row in rows if row["name"] == "by parameter"],
        "best single by validation loss": [min(own, key=lambda row: row["val_loss"]) for own in singles],
        "best single by test loss": [min(own, key=lambda row: row["test_loss"]) for own in singles],
        "best single, on train + val": [row for row in rows if row["name"] == "best single, train + val"],
    }
    print("| training | test loss | test accuracy | validation loss |\n| --- | --- | --- | --- |")
    for name, found in ways.items():
        cells = [spread([row[key] for row in found]) for key in ("test_loss", "test_accuracy", "val_loss")]
        print(f"| {name} | {' | '.join(cells)} |")
    costs = [
        tuned["seconds"] / statistics.median(row["seconds"] for row in own)
        for tuned, own in zip(ways["one decay a parameter"], singles)
    ]
    seconds = statistics.median(row["seconds"] for own in singles for row in own)
    print(f"cost: {spread(costs)} ordinary trainings (median {seconds:.2f} s)")


def ordinary(
    net: nn.Module, data: Labelled, decay: float, settings: DecaySettings, steps: int | None = None
) -> tuple[nn.Module, float]:
    """(the net after an ordinary training by torch.optim.Adam, its seconds)."""
    with seeded(settings.seed):
        own = MLP((1, 8, 8), 10, [layer.out_features for layer in net.modules() if isinstance(layer, nn.Linear)][:-1])
        own.load_state_dict(net.state_dict())
        started = time.perf_counter()
        optimizer = torch.optim.Adam(own.parameters(), settings.lr, weight_decay=decay)
        left = steps or settings.steps
        while left:
            for x, y in Loader(data, settings.batch):
                optimizer.zero_grad()
                F.cross_entropy(own(x), y).backward()
                optimizer.step()
                left -= 1
                if not left:
                    break
        return own, time.perf_counter() - started


def prove_overfit(quick: bool, seeds: int) -> list[Row]:
    rows: list[Row] = []
    for seed in range(seeds):
        data = load_digits((50, 50, DIGITS - 100), seed)
        with seeded(seed):
            net = MLP((1, 8, 8), 10, (300,))
        steps = 150 if quick else 1000
        chosen = DecaySettings(by="parameter", steps=steps, every=2, lr=3e-3, decay_lr=1.0, seed=seed)
        tuner = DecayTuner(net, F.cross_entropy, data["train"], data["val"], chosen)
        started = time.perf_counter()
        found = tuner.run()
        seconds = time.perf_counter() - started
        untuned = tuner._trained_with({name: torch.full_like(h, chosen.decay).log() for name, h in tuner.logs.items()})
        for name, trained in (("by parameter", found.net), ("untuned", untuned)):  # type: ignore[attr-defined]
            scores = {f"{part}_{key}": v for part in data for key, v in score(trained, data[part]).items()}
            rows.append({"what": "overfit", "name": name, "seed": seed, "seconds": seconds, **scores})
    return rows


def tell_overfit(rows: list[Row]) -> None:
    print("| training | train accuracy | validation accuracy | test accuracy |\n| --- | --- | --- | --- |")
    for name in ("by parameter", "untuned"):
        own = [row for row in rows if row["name"] == name]
        cells = [spread([row[f"{part}_accuracy"] for row in own]) for part in ("train", "val", "test")]
        print(f"| {name} | {' | '.join(cells)} |")


def keep_memory() -> bool:
    """Asks the C library to keep what is freed: tensors of megabytes are otherwise given back to the system and
    fetched again page by page, which takes longer than the arithmetic. The same for every training timed here."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    threshold, trim = -3, -1
    return bool(mallopt(threshold, 32 << 20)) and bool(mallopt(trim, 2**31 - 1))


PROOFS: dict[str, tuple[Callable[[bool, int], list[Row]], Callable[[list[Row]], None]]] = {
    "decay": (prove_decay, tell_decay),
    "overfit": (prove_overfit, tell_overfit),
    "clean": (prove_clean, tell_clean),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", action="append", choices=PROOFS, help="one of them (repeat for more); default: all")
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 101), metavar="N", help="runs of each")
    parser.add_argument("--quick", action="store_true", help="tiny versions of one seed, to see that all works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes machine and rows")
    options = parser.parse_args()
    if options.json and not options.json.parent.is_dir():
        print(f"--json {options.json}: no such folder {options.json.parent}", file=sys.stderr)
        return 2
    kept = keep_memory()
    rows: list[Row] = []
    for name in options.what or PROOFS:
        prove, tell = PROOFS[name]
        print(f"\n{name}", flush=True)
        found = prove(options.quick, 1 if options.quick else options.seeds)
        tell(found)
        rows += found
    if options.json:
        about = {**machine(["metahpo", "scikit-learn"]), "memory_kept": kept}
        options.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
