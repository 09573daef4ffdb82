"""Faults that need a second process or a file system: commands at once, signals, a full disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from proofs.commands import Case, Outcome, Run, differences, judged, refusal, run
from prove_resume import launch

MOMENTS: dict[str, Callable[[Run, Path], bool]] = {
    "as it begins": lambda kind, run_dir: (run_dir / kind.lock).exists(),
    "once config.yaml is there": lambda kind, run_dir: (run_dir / "config.yaml").exists(),
    "once versions.json is there": lambda kind, run_dir: (run_dir / "versions.json").exists(),
    "once a checkpoint is there": lambda kind, run_dir: any(run_dir.rglob("checkpoints/*.pt")),
    "once its last figures are there": lambda kind, run_dir: (run_dir / kind.last).exists(),
}
# Nothing to what a run takes on a disk, the last two for a search.
SIZES = ["8k", "20k", "32k", "48k", "64k", "96k", "160k", "240k"]


def cases(kind: Run) -> Iterator[Case]:
    for name, arguments in second(kind).items():
        yield Case("two commands", f"{kind.name}: {name}", lambda f, a=arguments: at_once(kind, f, a))
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        for moment in MOMENTS:
            yield Case(
                "signals",
                f"{kind.name}: {number.name} {moment}",
                lambda f, n=number, m=moment: stopped(kind, f, n, m),
            )
    for size in SIZES:
        yield Case("full disk", f"{kind.name}: {size}", lambda f, s=size: full(kind, f, s))


def second(kind: Run) -> dict[str, list[str]]:
    # The report of a search may be written while it is at work.
    uses = [use for use in kind.uses if kind.name != "search" or use[0] == "resume"]
    names = {name: [*arguments, "RUN"] for name, arguments, _ in uses}
    return {**names, "begin": [*kind.command, *kind.config, "run_dir=RUN"]}


def at_once(kind: Run, folder: Path, arguments: list[str]) -> Outcome:
    run_dir = folder / "run"
    folder.mkdir()
    process = launch([*kind.command, *kind.config, f"run_dir={run_dir}"], folder / "stderr")
    wait(process, lambda: (run_dir / "config.yaml").exists())
    os.kill(process.pid, signal.SIGSTOP)
    try:
        if not (run_dir / kind.lock).exists():
            return "skipped", "the first command had ended"
        before = snapshot(run_dir)
        code, _, err = run([word.replace("RUN", str(run_dir)) for word in arguments])
        if snapshot(run_dir) != before:
            return "fell short", f"files have changed; exit status {code}"
        return refusal(code, err, run_dir) if code else ("fell short", "exit status 0")
    finally:
        process.kill()
        process.join()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stopped(kind: Run, folder: Path, number: int, moment: str) -> Outcome:
    run_dir, errors = folder / "run", folder / "stderr"
    folder.mkdir()
    process = launch([*kind.command, *kind.config, f"run_dir={run_dir}"], errors)
    wait(process, lambda: MOMENTS[moment](kind, run_dir))
    os.kill(process.pid, number)
    process.join()
    said = errors.read_text()
    expected = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    # A signal before Python code takes it over ends the process as the system does.
    if process.exitcode not in (0, expected, -number):
        return "fell short", f"exit status {process.exitcode}: {said[-200:]}"
    if "Traceback" in said:
        return "fell short", f"a traceback: {said.splitlines()[-1]:.150}"
    if not (run_dir / "config.yaml").exists():
        shutil.rmtree(run_dir, ignore_errors=True)
        code, _, err = run([*kind.command, *kind.config, f"run_dir={run_dir}"])
        return ("held", "") if code == 0 else ("fell short", err)
    return must_end(kind, run_dir)


def must_end(kind: Run, run_dir: Path) -> Outcome:
    """Resumed, the run ends with 0 and the figures of the undisturbed one."""
    outcome, why = judged(kind, run_dir, [*kind.command, "--resume"])
    return ("fell short", f"resumed: {why}") if outcome == "held" and why else (outcome, why)


def full(kind: Run, folder: Path, size: str) -> Outcome:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    try:
        if subprocess.run(mount, capture_output=True).returncode:
            return "skipped", "mount -t tmpfs is not allowed"
    except FileNotFoundError:
        return "skipped", "there is no mount"
    try:
        run_dir = folder / "run"
        code, _, err = run([*kind.command, *kind.config, f"run_dir={run_dir}"])
        if code == 0:
            other = differences(kind, run_dir)
            return ("fell short", f"others: {', '.join(other)}") if other else ("held", "")
        outcome, why = refusal(code, err, run_dir)
        if outcome != "held" or not (run_dir / "config.yaml").exists():
            return outcome, why
        subprocess.run([*mount[:4], "size=100m,remount", *mount[5:]], check=True, capture_output=True)
        return must_end(kind, run_dir)
    finally:
        # A database that could not be opened may still have its file.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def wait(process, there: Callable[[], bool]) -> None:
    while process.is_alive() and not there():
        time.sleep(0.0005)
