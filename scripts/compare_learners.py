"""Meta-trains every learner on the bundled glyphs, 5-way 1-shot: 2,000 iterations each on the same tasks and net.

    python scripts/compare_learners.py --folder runs/learners --workers 2 --json learners.json --plot learners.png
    python scripts/compare_learners.py --learner maml --learner meta_sgd --seeds 1
    python scripts/compare_learners.py --quick

One run a config of configs/glyphs_5way_1shot/learners and seed, by ``metahpo train`` on one thread; those that --folder
holds already are not run again, and one that was stopped goes on. The exit status is 1 if Meta-SGD or MAML++ is not
above MAML.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from inner_loop.command import Parser
from inner_loop.machine import machine
from metahpo import cli

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "glyphs_5way_1shot" / "learners"
QUICK = ["training.epochs=1", "training.iterations=1", "training.val_tasks=2", "training.test_tasks=2"]
QUICK += ["net.filters=4"]


def main() -> int:
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learner", action="append", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, each on one thread")
    parser.add_argument("--folder", type=Path, help="keeps the runs here and goes on from them")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="a picture of the accuracies")
    parser.add_argument("--quick", action="store_true", help="MAML and ProtoNet, one seed, one iteration")
    options = parser.parse_args()
    chosen = options.learner or (["maml", "proto_net"] if options.quick else known)
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"--learner: no {unknown[0]!r}; known: {', '.join(known)}")
    if options.seeds < 1 or options.workers < 1:
        parser.error("--seeds and --workers should be at least 1")
    seeds = range(1 if options.quick else options.seeds)
    with tempfile.TemporaryDirectory() as folder:
        root = options.folder or Path(folder)
        jobs = [(root / f"{name}-{seed}", name, seed, options.quick) for seed in seeds for name in chosen]
        with ThreadPoolExecutor(options.workers) as pool:
            rows = list(pool.map(lambda job: row(*job), jobs))
        megabytes = {name: kept_memory(root / f"{name}-0" / "memory.json", name) for name in chosen}
    rows = [{**r, "megabytes": megabytes[r["learner"]]} for r in rows]
    print_table(rows)
    promises = compared(rows) if not options.quick else {}
    for text, kept in promises.items():
        print(f"{'ok  ' if kept else 'FAIL'} {text}")
    if options.json:
        content = {"machine": machine(["metahpo"]), "rows": rows, "promises": promises}
        options.json.write_text(json.dumps(content, indent=1))
    if options.plot:
        draw(rows, options.plot)
    return 0 if all(promises.values()) else 1


def row(folder: Path, name: str, seed: int, quick: bool) -> dict:
    """The test accuracies of a run, which is trained if it is not there yet."""
    if not (folder / "test.json").exists():
        train(folder, name, seed, quick)
    result = json.loads((folder / "test.json").read_text())["rows"]["best"]
    history = (folder / "metrics.csv").read_text().splitlines()
    column = history[0].split(",").index("seconds")
    seconds = sum(float(line.split(",")[column]) for line in history[1:])
    kinds = ("accuracy", "accuracy_ci", "accuracy_inductive", "accuracy_before")
    found = {kind: result[kind] for kind in kinds if kind in result}
    print(f"{name}, seed {seed}: {100 * found['accuracy']:.1f}%", file=sys.stderr, flush=True)
    return {"learner": name, "seed": seed, **found, "seconds": round(seconds, 1)}


def train(folder: Path, name: str, seed: int, quick: bool) -> None:
    arguments = [str(CONFIGS / f"{name}.yaml"), f"training.seed={seed}", "training.threads=1", f"run_dir={folder}"]
    arguments += ["training.engine=threads", *(QUICK if quick else [])]
    if (folder / "checkpoints").exists():
        arguments = ["--resume", str(folder)]
    if quick:  # A new interpreter takes longer to start than the training.
        if code := cli.main(["train", *arguments]):
            raise SystemExit(f"{name}, seed {seed}: exit status {code}")
        return
    done = subprocess.run([sys.executable, "-m", "metahpo", "train", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}, seed {seed}: {done.stderr[-2000:]}")


def kept_memory(path: Path, name: str) -> float | None:
    """What ``memory`` found; it is measured once."""
    if not path.exists():
        path.write_text(json.dumps(memory(name)))
    return json.loads(path.read_text())


def memory(name: str) -> float | None:
    """Peak megabytes of one task's outer gradient, by engine loop."""
    from metahpo.building import build
    from metahpo.config_file import load_config
    from metahpo.hypergrad.measure import measured
    from metahpo.training.engines import Loop

    config = load_config(CONFIGS / f"{name}.yaml")
    tasks, learner = build(config)
    batch, phase = tasks["train"].batch([0]), learner.training_phase(config.training.epochs)
    learner.cpu()
    Loop().meta_gradient(learner, batch, phase)
    _, _, peak = measured(lambda: Loop().meta_gradient(learner, batch, phase), torch.device("cpu"))
    return None if peak is None else round(peak / 2**20, 1)


def mean(rows: list[dict], learner: str, key: str) -> float:
    values = [row[key] for row in rows if row["learner"] == learner and row.get(key) is not None]
    return sum(values) / len(values) if values else float("nan")


def ranked(rows: list[dict]) -> list[str]:
    """The learners by their mean accuracy, the best first."""
    return sorted({row["learner"] for row in rows}, key=lambda name: -mean(rows, name, "accuracy"))


def print_table(rows: list[dict]) -> None:
    print(f"{'learner':20}{'accuracy':>10}{'by seed':>16}{'inductive':>11}{'before':>8}{'MB a task':>11}{'seconds':>9}")
    for name in ranked(rows):
        seeds = " ".join(f"{100 * row['accuracy']:.1f}" for row in rows if row["learner"] == name)
        cells = [100 * mean(rows, name, key) for key in ("accuracy_inductive", "accuracy_before")]
        print(
            f"{name:20}{100 * mean(rows, name, 'accuracy'):10.1f}{seeds:>16}{cells[0]:11.1f}{cells[1]:8.1f}"
            f"{mean(rows, name, 'megabytes'):11.1f}{mean(rows, name, 'seconds'):9.0f}"
        )


def compared(rows: list[dict]) -> dict[str, bool]:
    """Whether Meta-SGD and MAML++ are above MAML, as far as they were run."""
    there, promises = {row["learner"] for row in rows}, {}
    for name in ("meta_sgd", "maml_pp"):
        if {name, "maml"} <= there:
            ours, base = mean(rows, name, "accuracy"), mean(rows, "maml", "accuracy")
            promises[f"{name} {100 * ours:.1f}% is above maml {100 * base:.1f}%"] = ours > base
    return promises


def draw(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    names = ranked(rows)[::-1]
    figure = Figure(figsize=(8, 0.8 + 0.32 * len(names)), dpi=100, layout="constrained")
    axis = figure.subplots()
    for place, name in enumerate(names):
        own = [row for row in rows if row["learner"] == name]
        axis.barh(place, 100 * mean(rows, name, "accuracy"), color="C0" if "_pp" not in name else "C1", alpha=0.6)
        for row in own:
            axis.errorbar(100 * row["accuracy"], place, xerr=100 * row["accuracy_ci"], fmt="k.", capsize=2)
    axis.set_yticks(range(len(names)), names)
    axis.axvline(20, color="grey", linestyle=":")
    axis.set(xlabel="test accuracy, % (transductive; dots: seeds with 95% intervals over tasks)", xlim=(15, 100))
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
