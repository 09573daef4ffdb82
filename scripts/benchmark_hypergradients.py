"""Time and peak memory of one hypergradient by strategy and number of inner steps, on scikit-learn's digits.

python scripts/benchmark_hypergradients.py [--quick] [--net small|large] [--steps 1,10,...] [--strategy NAME]
                                           [--json FILE] [--plot FILE]

The small net (64-32-10, batch 64) goes to 10,000 steps, the large one (64-512-512-10, batch 512) to 1,000.
Each is measured in a process of its own (--quick: in one for all), after a run of three steps. What would take more
time or memory than --limit and --memory allow, by its course so far, is left out with a line that says so.
scripts/README.md explains the columns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from hypergradients.cases import CASES, NETS, REFERENCE, in_a_process, measure
from inner_loop.command import Parser
from inner_loop.machine import machine

COLUMNS = ("net", "strategy", "steps", "s", "cpu s", "peak MB", "error", "note")
EXACT = "Unroll(Mixed(), Sqrt())"


def main() -> int:
    options = parse()
    # The processes that measure look there for this script's modules.
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    about = machine(["metahpo", "scikit-learn"])
    print(", ".join(f"{key} {value}" for key, value in about.items() if value))
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS), flush=True)
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    for net, steps in [(each, count) for each in options.nets for count in options.steps[each]]:
        expected, whose = reference(net, steps, options)
        for name in options.strategy or CASES:
            found: dict[str, Any] = refusal(net, name, steps, rows, options) or run(net, name, steps, False, options)
            if "left_out" in found:
                left_out.append({"net": net, "strategy": name, "steps": steps, "reason": found["left_out"]})
                print(f"left out: {net}, {name} at {steps} steps: {found['left_out']}", flush=True)
                continue
            grads = found.pop("grads")
            if expected is None and name == EXACT:
                expected, whose = grads, f"error against {EXACT} in float32"
            row = {"net": net, "strategy": name, "steps": steps, **found}
            row["relative_error"] = error(name, grads, expected)
            row["note"] = "; ".join(filter(None, [CASES[name].note, whose]))
            if expected is grads:
                row |= {"relative_error": None, "note": "the others' reference"}
            rows.append(row)
            print("| " + " | ".join(cells(row)) + " |", flush=True)
        if options.json:
            options.json.write_text(json.dumps({"machine": about, "rows": rows, "left_out": left_out}, indent=2) + "\n")
    summary(rows)
    if options.plot:
        plot(rows, options.plot)
    return 0


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small net and few steps, to see that all works")
    parser.add_argument("--net", choices=NETS, help="only this one")
    parser.add_argument("--steps", type=counts, help="default: 1,10,...,10000; large: to 1000; with --quick: 1,10")
    parser.add_argument("--strategy", action="append", choices=CASES, help="only this one; may be repeated")
    parser.add_argument("--limit", type=float, default=300, help="seconds that a run may take")
    parser.add_argument("--memory", type=float, default=16, help="GB that a run may take")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw time and peak memory over steps here")
    options = parser.parse_args()
    options.nets = [options.net] if options.net else ["small"] if options.quick else list(NETS)
    most = 10 if options.quick else 10000
    usual = {net: [n for n in (1, 10, 100, 1000, 10000) if n <= (most if net == "small" else 1000)] for net in NETS}
    options.steps = dict.fromkeys(NETS, options.steps) if options.steps else usual
    for flag, path in (("--json", options.json), ("--plot", options.plot)):
        if path and not path.absolute().parent.is_dir():
            parser.error(f"{flag} {path}: no such folder")
    return options


def counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected numbers of steps of at least 1, as 1,10,100, found {text!r}")
    return sorted(map(int, parts))


def reference(net: str, steps: int, options: argparse.Namespace) -> tuple[dict[str, Any] | None, str]:
    """The exact hypergradient in float64; None where that is too long."""
    if steps > 1000:
        return None, ""
    return run(net, REFERENCE, steps, True, options).get("grads"), ""


def run(net: str, name: str, steps: int, double: bool, options: argparse.Namespace) -> dict[str, Any]:
    if options.quick:
        return measure(net, name, steps, double)
    return in_a_process(net, name, steps, double, options.limit)


def refusal(
    net: str, name: str, steps: int, rows: list[dict[str, Any]], options: argparse.Namespace
) -> dict[str, str] | None:
    """Why a run would be too long or too large, by the two runs before it."""
    past = [row for row in rows if (row["net"], row["strategy"]) == (net, name)][-2:]
    if not past:
        return None
    times = steps / past[-1]["steps"]
    if (seconds := past[-1]["seconds"] * times) > options.limit:
        return {"left_out": f"would take about {seconds:.0f} s"}
    peaks = [row["peak_bytes"] or 0 for row in past]
    if len(past) > 1 and peaks[1] > 1e8:
        slope = (peaks[1] - peaks[0]) / (past[1]["steps"] - past[0]["steps"])
        # What grows with the root of the steps grows less than the line.
        if (peak := peaks[1] + slope * (steps - past[1]["steps"])) > options.memory * 1e9:
            return {"left_out": f"would take about {peak / 1e9:.0f} GB"}
    return None


def error(name: str, grads: dict[str, Any], expected: dict[str, Any] | None) -> float | None:
    """The norm of the difference over the norm, of all gradients (of the loss's hyperparameters) together."""
    if expected is None or not CASES[name].compared:
        return None
    names = [n for n in grads if CASES[name].own or not n.startswith("rule.")]
    flat, right = (
        torch.cat([torch.tensor(g[n], dtype=torch.float64).flatten() for n in names]) for g in (grads, expected)
    )
    return float((flat - right).norm() / right.norm())


def cells(row: dict[str, Any]) -> list[str]:
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f}"
    wrong = "" if row["relative_error"] is None else f"{row['relative_error']:.1e}"
    times = [f"{row[key]:.3g}" for key in ("seconds", "cpu_seconds")]
    return [row["net"], f"`{row['strategy']}`", str(row["steps"]), *times, peak, wrong, row["note"]]


def summary(rows: list[dict[str, Any]]) -> None:
    """Mixed mode with remat over plain reverse mode, at 1,000 steps."""
    by = {(row["net"], row["strategy"]): row for row in rows if row["steps"] == 1000}
    for net in NETS:
        exact, plain = by.get((net, EXACT)), by.get((net, "Unroll(Reverse())"))
        if exact and plain:
            ratios = [f"{exact[k] / plain[k]:.2f} {what}" for k, what in (("seconds", "time"), ("cpu_seconds", "CPU"))]
            memory = f"1/{plain['peak_bytes'] / max(exact['peak_bytes'], 1):.0f} memory" if plain["peak_bytes"] else ""
            print(f"{net} net, 1000 steps: {EXACT} takes of Unroll(Reverse())'s: {', '.join([*ratios, memory])}")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and peak memory over inner steps, a line for each strategy and a pair of panels for each net."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    nets, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("net", "strategy"))
    figure, panels = plt.subplots(len(nets), 2, figsize=(11, 4.2 * len(nets)), squeeze=False)
    for net, pair in zip(nets, panels):
        for axes, key, unit, what in zip(pair, ("seconds", "peak_bytes"), (1, 1e6), ("time, s", "peak memory, MB")):
            for i, name in enumerate(names):
                chosen = [row for row in rows if (row["net"], row["strategy"]) == (net, name)]
                look = {
                    "color": f"C{i % 10}",
                    "marker": "osD^vPX*<>h"[i % 11],
                    "ls": "-" if CASES[name].exact else "--",
                }
                points = [(row["steps"], row[key] / unit) for row in chosen if row[key]]
                axes.plot(*zip(*points) if points else ([], []), label=name, markersize=5, lw=1.4, **look)
            axes.set(xscale="log", yscale="log", xlabel="inner steps", ylabel=what, title=f"{net} net")
            axes.grid(alpha=0.3)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1, 0.5), title="exact: solid; else: dashed")
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())
