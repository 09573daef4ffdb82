"""A tuning that is kept in a folder and goes on after a stop, and its result's file."""

from __future__ import annotations

import hashlib
import io
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from metahpo.errors import CheckpointError, ConfigError, NonFiniteError
from metahpo.run_dirs import check_begun
from metahpo.runs.files import write_atomically, write_json
from metahpo.training.checkpoint import CheckpointStore, DamagedCheckpoint, load_checkpoint
from metahpo.training.environment import versions
from metahpo.training.interrupts import Interrupted, Interrupts
from metahpo.training.metrics import CsvLog, Row
from metahpo.tuning.base import Result, Tuner

CONTENT = {"iteration": int, "tuner": dict, "history": list, "warnings": list, "settings": dict}
SAVE_SECONDS = 5.0


class TuningRun:
    """Runs a tuner and keeps metrics.csv, versions.json and checkpoints in ``run_dir``.

    settings: what the run's numbers depend on, as plain values; a checkpoint of others is refused. A run that was
    stopped and resumed is bit for bit the run that was not (on the CPU, with the same torch and number of threads).
    """

    def __init__(self, tuner: Tuner, run_dir: str | Path, settings: Mapping[str, Any], device: torch.device):
        self.tuner, self.run_dir, self.settings, self.device = tuner, Path(run_dir), dict(settings), device
        self.store = CheckpointStore(self.run_dir / "checkpoints", CONTENT)
        self._seconds: list[float] = []
        self._saved = time.monotonic()

    def resume(self) -> None:
        """Takes up the newest whole checkpoint; a run that was killed before its first one begins again."""
        if not self.store.list():
            check_begun(self.run_dir)
            return
        path, state, damaged = self.store.latest()
        for line in damaged:
            print(f"{line}; going on from {path.name}", file=sys.stderr)
        for key, value in self.settings.items():
            if state["settings"].get(key) != value:
                raise ConfigError(
                    f"{key}: config.yaml says {value!r}, but {path.name} was tuned with "
                    f"{state['settings'].get(key)!r}; set it back, or tune anew"
                )
        try:
            self.tuner.load_state_dict(state["tuner"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{path}: cannot go on from it: {type(error).__name__}: {error}") from error
        self.tuner.iteration, self.tuner.history = state["iteration"], state["history"]
        self.tuner.warnings = dict.fromkeys(state["warnings"])
        self._seconds = CsvLog(self.run_dir / "metrics.csv").restore(self.tuner.history)

    def fit(self, until: int | None = None, each: Callable[[Row], None] | None = None) -> Result:
        """Makes the steps left, up to ``until`` in all. Ctrl-C or SIGTERM ends the current step, saves, and raises
        ``Interrupted``; a divergence keeps the checkpoints before it."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        write_json(self.run_dir / "versions.json", versions(self.device))
        started = time.perf_counter()

        def after(row: Row) -> None:
            nonlocal started
            self._seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
            if each:
                each({**row, "seconds": self._seconds[-1]})
            if interrupts.signum is not None or time.monotonic() - self._saved > SAVE_SECONDS:
                self.save()
            if interrupts.signum is not None:
                raise Interrupted(interrupts.signum)

        with Interrupts() as interrupts:
            try:
                result = self.tuner.run(until, after)
            except NonFiniteError as error:
                kept = self.store.list()
                where = f"outer step {self.tuner.iteration + 1}: {error}"
                raise NonFiniteError(where + (f"; the last good checkpoint is {kept[-1]}" if kept else "")) from error
            self.save()
        return result

    def save(self) -> None:
        rows = [{**row, "seconds": round(s, 3)} for row, s in zip(self.tuner.history, self._seconds)]
        if not rows:
            return
        state = {
            "iteration": self.tuner.iteration,
            "tuner": self.tuner.state_dict(),
            "history": self.tuner.history,
            "warnings": list(self.tuner.warnings),
            "settings": self.settings,
        }
        # The checkpoint first: a log without one is not gone on with, and resuming writes a log that lacks a row again.
        self.store.save(state, self.tuner.iteration)
        CsvLog(self.run_dir / "metrics.csv").write(rows)
        self._saved = time.monotonic()


def save_result(path: Path, result: Result) -> None:
    """Writes what a tuning found, with a checksum of the content in it, which ``load_result`` compares."""
    content = result.tensors()
    buffer = io.BytesIO()
    torch.save({**content, "checksum": content_sum(content)}, buffer)
    write_atomically(path, buffer.getvalue())


def load_result(path: str | Path) -> dict[str, Any]:
    """What a tuning found, from its run's result.pt: the ``tensors()`` of its result, without the checksum.

    A file without a checksum, as older versions wrote, is taken as it is.

    Raises:
        CheckpointError: The file cannot be read, is not as it was written, or holds code.
    """
    content = load_checkpoint(path, {})
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not the result of a tuning: it holds {type(content).__name__}")
    written = content.pop("checksum", None)
    if written not in (None, content_sum(content)):
        raise DamagedCheckpoint(f"{path} is damaged: its checksum is not {content_sum(content)}, its content's")
    return content


def content_sum(tree: Any) -> str:
    """The start of the SHA-256 of a tree of tensors and plain values."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            digest.update(f"{len(value)} entries ".encode())
            for key, inner in value.items():
                add(key)
                add(inner)
        elif isinstance(value, (list, tuple)):
            digest.update(f"{len(value)} values ".encode())
            for inner in value:
                add(inner)
        else:
            digest.update(f"{value!r} ".encode())

    add(tree)
    return digest.hexdigest()[:16]
