"""The folders that runs are kept in."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

from metahpo.errors import CheckpointError, ConfigError, UsageError


def check_new(run_dir: Path) -> None:
    """Raises, before data is loaded, if the run cannot be kept in ``run_dir``."""
    for path in (run_dir, *run_dir.parents):
        if path.exists():
            if not path.is_dir():
                raise ConfigError(f"run_dir {run_dir}: {path} is a file, expected a folder")
            if not os.access(path, os.W_OK | os.X_OK):
                raise ConfigError(f"run_dir {run_dir}: no permission to write in {path}")
            break
    if any((run_dir / "checkpoints").glob("*.pt")):
        raise CheckpointError(f"{run_dir} already holds a run; --resume it or choose another run_dir")


def check_begun(run_dir: Path) -> None:
    """Raises if a run without a checkpoint has got further than that: to begin it again would write over its log."""
    progress = [name for name in ("metrics.csv", "test.json", "result.pt") if (run_dir / name).exists()]
    if progress:
        raise CheckpointError(
            f"{run_dir} has {progress[0]} and no checkpoint to go on from; put {run_dir / 'checkpoints'} back, or "
            "begin a new run with its config.yaml in another run_dir"
        )


def existing_run_dir(name: str) -> Path:
    """Its absolute path: the user's code may change the working directory."""
    path = Path(name).absolute()
    if not (path / "config.yaml").exists():
        raise CheckpointError(f"{name} is not a run directory: it has no config.yaml")
    return path


def is_search(run_dir: Path) -> bool:
    """Whether that is the run directory of a search."""
    return _has_section(run_dir, "space")


def trained_run_dir(name: str) -> Path:
    """The run directory of a training; those of tunings and searches are refused with what to do."""
    path = existing_run_dir(name)
    if _has_section(path, "tune"):
        raise UsageError(f"{name} is the run of a tuning; metahpo tune KIND --resume {name} tests and reports it again")
    if is_search(path):
        raise UsageError(
            f"{name} is the run of a search; metahpo search --resume {name} goes on with it, "
            f"and metahpo train {Path(name) / 'best.yaml'} trains its best"
        )
    return path


def _has_section(run_dir: Path, section: str) -> bool:
    lines = (run_dir / "config.yaml").read_text(encoding="utf-8", errors="replace").splitlines()
    return any(line.startswith(f"{section}:") for line in lines)


def new_run_dir(config: Path) -> Path:
    """Makes runs/CONFIG/DATE-TIME, or with a number after it where another run was as fast."""
    base = Path("runs").absolute() / config.parent.name / config.stem / time.strftime("%Y-%m-%d-%H%M%S")
    for number in itertools.count(1):
        path = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise AssertionError("unreachable")
