"""Times one meta-step, the outer gradient of second-order MAML over a batch of tasks, by every engine and every peer.

python scripts/benchmark_inner_loop.py [--workload NAME] [--only NAME] [--device cpu|cuda] [--json FILE] [--quick]

All compute the same gradient of the same weights and tasks, which is checked against the loop in float64; then they are
timed in turn, A B C A B C. Exits 1 if a gradient is wrong or an engine breaks. scripts/README.md explains the columns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from inner_loop.command import Parser
from inner_loop.contenders import KINDS, Contender, make
from inner_loop.machine import machine
from inner_loop.measure import idle_share, in_float64, in_turn, peak_memory, relative_error
from inner_loop.peers import Broken, LeftOut
from inner_loop.workloads import SPECS, build
from metahpo.errors import one_line

FLOAT32_BOUND, FLOAT64_BOUND = 1e-5, 1e-10
# Each compiles or records for longer than --quick may last.
SLOW_TO_COMPILE = {"graph": set(SPECS), "jax": set(SPECS) - {"mlp"}, "trace": set(SPECS) - {"mlp"}}
COLUMNS = ("name", "kind", "median s", "min s", "/ fastest peer", "/ plain_loop", "tasks/s", "peak MB", "error")


def main() -> int:
    options = parse()
    # The process that measures memory looks there for this script's modules.
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    if options.device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    about = machine(["higher", "learn2learn", "torchopt", "jax", "metahpo"])
    print(", ".join(f"{key} {value}" for key, value in about.items() if value), flush=True)
    result: dict[str, Any] = {"machine": about, "rows": [], "left_out": []}
    faults: list[str] = []
    for name in options.workload or SPECS:
        faults += run(name, options, result)
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + "\n")
    for fault in faults:
        print(f"WRONG: {fault}")
    return 1 if faults else 0


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", action="append", choices=SPECS, help="only this one; may be repeated")
    parser.add_argument("--only", action="append", choices=KINDS, help="only this engine or peer; may be repeated")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tasks", type=positive, help="tasks a meta-step, in place of the workload's own")
    parser.add_argument("--rounds", type=positive, help="steps timed of each (default 10; with --quick 1)")
    parser.add_argument("--limit", type=positive, default=300, help="leave out what takes more seconds for two steps")
    parser.add_argument("--float64", action="store_true", help="compare the engines in double precision too")
    parser.add_argument("--quick", action="store_true", help="tiny versions of the workloads, under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 10)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: no such folder")
    return options


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def run(name: str, options: argparse.Namespace, result: dict[str, Any]) -> list[str]:
    """One workload: adds its rows to the result, and gives what is wrong, a line each."""
    arguments = {"name": name, "quick": options.quick, "tasks": options.tasks, "device": options.device}
    workload = build(**arguments)
    exact = in_float64(workload)
    reference = make("loop", exact)
    expected = reference.grads(reference.step())
    contenders: list[Contender] = []
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    for who, kind in KINDS.items():
        if options.only and who not in options.only:
            continue
        if sys.stderr.isatty():
            print(f"\r\033[K{name}: {who}", end="\r", file=sys.stderr, flush=True)
        try:
            if options.quick and not options.only and name in SLOW_TO_COMPILE.get(who, ()):
                raise LeftOut(f"compiles for long; --quick --only {who} runs it")
            # The processes that measure memory take longer to start than --quick may last.
            peak = None if options.quick else peak_memory(who, options.limit, arguments)
            contender = make(who, workload)
            error = relative_error(contender.grads(contender.step()), expected)
            row = {"workload": name, "device": options.device, "name": who, "kind": kind, "peak_bytes": peak}
            row |= {"relative_error": error, "tasks": len(workload.tasks.query_x)}
            if not error <= FLOAT32_BOUND:
                faults.append(f"{name}: {who} has relative error {error:.1e}, more than {FLOAT32_BOUND}")
            if options.float64 and kind == "engine":
                engine = make(who, exact)
                row["relative_error_float64"] = error = relative_error(engine.grads(engine.step()), expected)
                if not error <= FLOAT64_BOUND:
                    faults.append(f"{name}: {who} has relative error {error:.1e} in float64, more than {FLOAT64_BOUND}")
            contenders.append(contender)
            rows.append(row)
        except Exception as error:
            broken = isinstance(error, Broken) or not isinstance(error, LeftOut)
            reason = str(error) if isinstance(error, LeftOut) else f"{type(error).__name__}: {one_line(error)}"
            result["left_out"].append({"workload": name, "name": who, "reason": reason})
            if broken and kind == "engine":
                faults.append(f"{name}: {who} failed: {reason}")
    seconds = in_turn(contenders, options.rounds, options.device)
    for row, contender in zip(rows, contenders):
        times = seconds[contender.name]
        row |= {"median_s": statistics.median(times), "min_s": min(times)}
        row["tasks_per_s"] = row["tasks"] / row["median_s"]
        row["idle_share"] = idle_share(contender, row["median_s"]) if options.device == "cuda" else None
    show(name, rows, [entry for entry in result["left_out"] if entry["workload"] == name])
    result["rows"] += rows
    return faults


def show(name: str, rows: list[dict[str, Any]], left_out: list[dict[str, Any]]) -> None:
    """Prints a workload's table."""
    cuda = any(row["device"] == "cuda" for row in rows)
    peers = [row["median_s"] for row in rows if row["kind"] == "peer"]
    loop = [row["median_s"] for row in rows if row["name"] == "plain_loop"]
    print(f"\n{name}, {rows[0]['tasks']} tasks" if rows else f"\n{name}")
    lines = [(*COLUMNS, "idle") if cuda else COLUMNS]
    for row in rows:
        median, peak, idle = row["median_s"], row["peak_bytes"], row["idle_share"]
        ratios = [f"{median / min(times):.2f}" if times else "-" for times in (peers, loop)]
        line = [row["name"], row["kind"], f"{median:.4f}", f"{row['min_s']:.4f}", *ratios, f"{row['tasks_per_s']:.1f}"]
        line += ["-" if peak is None else f"{peak / 1e6:.1f}", f"{row['relative_error']:.1e}"]
        lines.append((*line, "-" if idle is None else f"{idle:.0%}") if cuda else tuple(line))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines if rows else []:
        print("  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))))
    for entry in left_out:
        print(f"left out: {entry['name']}: {entry['reason']}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
