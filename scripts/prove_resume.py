"""Kills a training with SIGKILL at random moments, resumes it, and compares its end with an undisturbed run's.

python scripts/prove_resume.py [--kills 20] [--quick] [--json FILE]

Half of the kills wait for a checkpoint that is being written. No epoch that the log
holds may be lost, and at the end the final checkpoint must be the same file, byte for byte. Exits 1 if not.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from metahpo import __main__ as program
from metahpo.training.checkpoint import CheckpointStore, position
from metahpo.training.metrics import CsvLog

SETTINGS = [
    *("data.queries=2", "data.eval_queries=2", "net.filters=16", "learner.steps=2"),
    *("training.iterations=8", "training.tasks=2", "training.val_tasks=4", "training.test_tasks=4"),
    *("training.keep_best=2", "training.engine=loop", "training.device=cpu"),
]
QUICK = ["net.filters=4", "learner.steps=1", "training.iterations=4"]
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "glyphs_5way_1shot" / "quick.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="3 kills of a short run")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    kills, epochs = (3, 8) if options.quick else (options.kills, 5 * options.kills)
    settings = [*SETTINGS, *(QUICK if options.quick else []), f"training.epochs={epochs}"]
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        print(f"an undisturbed run of {epochs} epochs", flush=True)
        started = time.perf_counter()
        wait(start(whole, settings), whole, "the undisturbed run")
        rows = kill_and_resume(killed, settings, epochs, kills, time.perf_counter() - started, rng)
        first, second = (CheckpointStore(run / "checkpoints").list()[-1] for run in (whole, killed))
        same = first.name == second.name and first.read_bytes() == second.read_bytes()
    saving = sum(row["while_saving"] for row in rows)
    lost = max(row["logged_epochs_lost"] for row in rows)
    print(
        f"{len(rows)} kills, {saving} while a checkpoint was being written; "
        f"at most {max(lost, 0)} epochs of the log lost at each; the final checkpoint is "
        + ("the same, byte for byte" if same else "DIFFERENT")
    )
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "same": same}, indent=2))
    return 0 if same and lost <= 0 and len(rows) == kills and (saving or options.quick) else 1


def start(run_dir: Path, settings: list[str]) -> BaseProcess:
    """A training, or the resumption of the one in ``run_dir``, in a process of its own."""
    begun = (run_dir / "config.yaml").exists()
    arguments = ["--resume", str(run_dir)] if begun else [str(CONFIG), *settings, f"run_dir={run_dir}"]
    return launch(["train", *arguments], errors_of(run_dir))


def launch(arguments: list[str], errors: Path) -> BaseProcess:
    """A command of metahpo in a process of its own; what it says on stderr goes to the file ``errors``."""
    # Forks of a process that has imported what they need and computed nothing: a new interpreter takes seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "metahpo.building", "metahpo.report"])
    process = context.Process(target=command, args=(arguments, errors))
    process.start()
    return process


def command(arguments: list[str], errors: Path) -> None:
    """What the process does."""
    with open(os.devnull, "w") as nowhere, open(errors, "w") as stderr:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
    sys.argv = ["metahpo", *arguments]
    sys.exit(program.main())


def errors_of(run_dir: Path) -> Path:
    return run_dir.with_suffix(".stderr")


def wait(process: BaseProcess, run_dir: Path, what: str) -> None:
    process.join()
    if process.exitcode:
        sys.exit(f"{what} failed with {process.exitcode}: {errors_of(run_dir).read_text()[-500:]}")


def kill_and_resume(
    run_dir: Path, settings: list[str], epochs: int, kills: int, seconds: float, rng: random.Random
) -> list[dict]:
    """Kills ``kills`` times, each a random share of the remaining epochs further on, then lets the run end."""
    rows: list[dict] = []
    checkpoints = run_dir / "checkpoints"
    for number in range(kills):
        process = start(run_dir, settings)
        done = newest(checkpoints)
        target = done + rng.randint(1, max(1, (epochs - 1 - done) // (kills - number)))
        wait_for_epoch(process, checkpoints, target)
        saving = number % 2 == 1
        if saving:
            wait_for_writing(process, checkpoints)
        else:
            time.sleep(rng.random() * seconds / epochs)
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            sys.exit(f"the run ended by itself with {process.exitcode}: {errors_of(run_dir).read_text()[-500:]}")
        torn = any(checkpoints.glob(".*.tmp"))
        # A row of the log is written after its checkpoint; ``latest`` reads and checks the file that resuming takes.
        finished = len(CsvLog(run_dir / "metrics.csv").read())
        resumed = position(CheckpointStore(checkpoints).latest()[0])[0]
        rows.append({"epoch": resumed, "while_saving": torn, "logged_epochs_lost": finished - resumed})
        print(f"kill {number + 1}/{kills}: at epoch {resumed}{', writing a checkpoint' if torn else ''}", flush=True)
    wait(start(run_dir, settings), run_dir, "the last resumption")
    return rows


def newest(checkpoints: Path) -> int:
    """Whole epochs in the newest checkpoint."""
    paths = CheckpointStore(checkpoints).list()
    return position(paths[-1])[0] if paths else 0


def wait_for_epoch(process: BaseProcess, checkpoints: Path, epoch: int) -> None:
    while newest(checkpoints) < epoch and process.is_alive():
        time.sleep(0.002)


def wait_for_writing(process: BaseProcess, checkpoints: Path) -> None:
    pattern = re.compile(r"\..*\.tmp")
    while process.is_alive() and not any(pattern.fullmatch(path.name) for path in checkpoints.iterdir()):
        pass


if __name__ == "__main__":
    sys.exit(main())
