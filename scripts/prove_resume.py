"""Kills a training with SIGKILL at random moments, resumes it, and compares its end with an undisturbed run's.

python scripts/prove_resume.py [--kills 20] [--quick] [--json FILE]

Half of the kills wait for a checkpoint that is being written. A kill may cost one finished epoch at most, and at the
end the final checkpoint must be the same file, byte for byte. Exits 1 if not.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from metahpo.training.checkpoint import CheckpointStore, position
from metahpo.training.metrics import CsvLog

SETTINGS = [
    *("data.queries=2", "data.eval_queries=2", "net.filters=16", "learner.steps=2"),
    *("training.iterations=8", "training.tasks=2", "training.val_tasks=4", "training.test_tasks=4"),
    *("training.keep_best=2", "training.engine=loop", "training.device=cpu"),
]
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "glyphs_5way_1shot" / "quick.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="3 kills of a short run")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    kills, epochs = (3, 12) if options.quick else (options.kills, 5 * options.kills)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        print(f"an undisturbed run of {epochs} epochs", flush=True)
        started = time.perf_counter()
        wait(start(whole, epochs), "the undisturbed run")
        rows = kill_and_resume(killed, epochs, kills, time.perf_counter() - started, rng)
        first, second = (CheckpointStore(run / "checkpoints").list()[-1] for run in (whole, killed))
        same = first.name == second.name and first.read_bytes() == second.read_bytes()
    saving = sum(row["while_saving"] for row in rows)
    lost = max(row["finished_epochs_lost"] for row in rows)
    print(
        f"{len(rows)} kills, {saving} while a checkpoint was being written; "
        f"at most {lost} finished epoch lost at each; the final checkpoint is "
        + ("the same, byte for byte" if same else "DIFFERENT")
    )
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "same": same}, indent=2))
    return 0 if same and lost <= 1 and len(rows) == kills and (saving or options.quick) else 1


def start(run_dir: Path, epochs: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "metahpo", "train"]
    if (run_dir / "config.yaml").exists():
        command += ["--resume", str(run_dir)]
    else:
        command += [str(CONFIG), *SETTINGS, f"training.epochs={epochs}", f"run_dir={run_dir}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait(process: subprocess.Popen[bytes], what: str) -> None:
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{what} failed with {process.returncode}: {errors.decode()[-500:]}")


def kill_and_resume(run_dir: Path, epochs: int, kills: int, seconds: float, rng: random.Random) -> list[dict]:
    """Kills ``kills`` times, each a random share of the remaining epochs further on, then lets the run end."""
    rows: list[dict] = []
    checkpoints = run_dir / "checkpoints"
    for number in range(kills):
        process = start(run_dir, epochs)
        done = newest(checkpoints)
        target = done + rng.randint(1, max(1, (epochs - 1 - done) // (kills - number)))
        wait_for_epoch(process, checkpoints, target)
        saving = number % 2 == 1
        if saving:
            wait_for_writing(process, checkpoints)
        else:
            time.sleep(rng.random() * seconds / epochs)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.returncode != -signal.SIGKILL:
            sys.exit(f"the run ended by itself with {process.returncode}: {process.stderr.read().decode()[-500:]}")
        torn = any(checkpoints.glob(".*.tmp"))
        # An epoch is logged before its checkpoint; ``latest`` reads and checks the file that resuming takes.
        finished = len(CsvLog(run_dir / "metrics.csv").read())
        resumed = position(CheckpointStore(checkpoints).latest()[0])[0]
        rows.append({"epoch": resumed, "while_saving": torn, "finished_epochs_lost": finished - resumed})
        print(f"kill {number + 1}/{kills}: at epoch {resumed}{', writing a checkpoint' if torn else ''}", flush=True)
    wait(start(run_dir, epochs), "the last resumption")
    return rows


def newest(checkpoints: Path) -> int:
    """Whole epochs in the newest checkpoint."""
    paths = CheckpointStore(checkpoints).list()
    return position(paths[-1])[0] if paths else 0


def wait_for_epoch(process: subprocess.Popen[bytes], checkpoints: Path, epoch: int) -> None:
    while newest(checkpoints) < epoch and process.poll() is None:
        time.sleep(0.002)


def wait_for_writing(process: subprocess.Popen[bytes], checkpoints: Path) -> None:
    pattern = re.compile(r"\..*\.tmp")
    while process.poll() is None and not any(pattern.fullmatch(path.name) for path in checkpoints.iterdir()):
        pass


if __name__ == "__main__":
    sys.exit(main())
