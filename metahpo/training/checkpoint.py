"""Checkpoints that survive a crash at any moment and are never half read."""

from __future__ import annotations

import io
import pickle
import re
import sys
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from metahpo.errors import CheckpointError, one_line, shown
from metahpo.functional.buffers import load_whole_state, optional_state, whole_state
from metahpo.learners.base import MetaLearner
from metahpo.runs.files import checksum, write_atomically

State = dict[str, Any]
# epoch-0003.<checksum>.pt holds the state after 3 epochs; epoch-0003-step-00017 that after 17 more iterations.
_NAME = re.compile(r"epoch-(\d+)(?:-step-(\d+))?\.([0-9a-f]{16})\.pt")
# What every checkpoint of a training holds, with its type.
TRAINING = {
    "epoch": int,
    "iteration": int,
    "learner": dict,
    "optimizer": dict,
    "history": list,
    "partial": dict,
    "settings": dict,
}


class CheckpointStore:
    """The checkpoints of one run, in one folder.

    A file is written whole under another name, synced, and renamed, so a name that exists is a complete file; the name
    carries the start of the content's SHA-256, so later damage is noticed. ``torch.load(file, weights_only=True)``
    reads it. content: the types, by name, of what every one of them holds.
    """

    def __init__(self, folder: str | Path, content: Mapping[str, type] = TRAINING):
        self.folder, self.content = Path(folder), content

    def save(self, state: State, epoch: int, iteration: int = 0, keep: Collection[int] = ()) -> Path:
        """Saves ``state`` reached after ``epoch`` whole epochs and ``iteration`` iterations of the next.

        Then deletes all but the two newest checkpoints and those of the epochs in ``keep``.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(_canonical(state), buffer)
        data = buffer.getvalue()
        step = f"-step-{iteration:05d}" if iteration else ""
        path = self.folder / f"epoch-{epoch:04d}{step}.{checksum(data)}.pt"
        write_atomically(path, data)
        self._prune(path, keep)
        return path

    def list(self) -> list[Path]:
        """All checkpoints, oldest state first."""
        return sorted((p for p in self.folder.glob("*.pt") if _NAME.fullmatch(p.name)), key=position)

    def latest(self) -> tuple[Path, State, list[str]]:
        """The newest checkpoint that is whole: its path, its state, and a line for each damaged one passed over."""
        damaged: list[str] = []
        for path in reversed(self.list()):
            try:
                return path, load_checkpoint(path, self.content), damaged
            except DamagedCheckpoint as error:
                damaged.append(str(error))
        if damaged:
            raise CheckpointError(f"no whole checkpoint in {self.folder}: {'; '.join(damaged)}")
        raise CheckpointError(f"no checkpoint in {self.folder}")

    def of_epoch(self, epoch: int) -> Path:
        """The checkpoint taken after ``epoch`` whole epochs."""
        for path in self.list():
            if position(path) == (epoch, 0):
                return path
        raise CheckpointError(f"no checkpoint of epoch {epoch} in {self.folder}")

    def _prune(self, newest: Path, keep: Collection[int]) -> None:
        for stray in self.folder.glob(".*.tmp"):
            stray.unlink(missing_ok=True)
        # The same position saved twice (another machine's rounding) leaves one file: the new one.
        paths = [p for p in self.list() if p == newest or position(p) != position(newest)]
        wanted = {newest, *paths[-2:], *(p for p in paths if position(p)[1] == 0 and position(p)[0] in keep)}
        for path in self.list():
            if path not in wanted:
                path.unlink(missing_ok=True)


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose content is not what was written."""


def position(path: Path) -> tuple[int, int]:
    """(whole epochs, iterations of the next) of a checkpoint, by its name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not named like a checkpoint (epoch-0001.CHECKSUM.pt)")
    return int(match[1]), int(match[2] or 0)


def load_checkpoint(path: str | Path, content: Mapping[str, type] = TRAINING) -> State:
    """Reads one checkpoint, which should hold ``content`` (types by name).

    Raises DamagedCheckpoint if it was damaged, CheckpointError if it holds code.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}") from None
    match = _NAME.fullmatch(path.name)
    if match and checksum(data) != match[3]:
        raise DamagedCheckpoint(
            f"checkpoint {path} is damaged: its checksum is {checksum(data)}, its name says {match[3]}"
        )
    _check_entries(data, path)
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"checkpoint {path} holds code or objects other than tensors and plain values; refused"
        ) from None
    except Exception as error:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: {one_line(error)}") from None
    for name, kind in content.items():
        if not (isinstance(state, dict) and isinstance(state.get(name), kind)):
            raise CheckpointError(f"{path} is not a metahpo checkpoint: it has no {name!r} ({kind.__name__})")
    for name in ("epoch", "iteration"):
        if name in content and state[name] < 0:
            raise CheckpointError(f"{path}: {name}: found {state[name]}, expected at least 0")
    if "partial" in content:
        _check_partial(state["partial"], path)
    if "warnings" in content and not all(isinstance(line, str) for line in state["warnings"]):
        raise CheckpointError(f"{path}: warnings: found {shown(state['warnings'])}, expected lines of text")
    if "history" in content:
        _check_history(state["history"], ("epoch", "val_loss") if "epoch" in content else (), path)
    return state


def _check_history(history: list[Any], needed: tuple[str, ...], path: Path) -> None:
    """Raises unless the rows are figures by name, with those that ``needed`` names."""
    for number, row in enumerate(history, start=1):
        if not isinstance(row, dict) or not set(needed) <= set(row):
            raise CheckpointError(f"{path}: history: row {number} has no {' and '.join(needed) or 'figures'}")
        for name, value in row.items():
            if not (isinstance(name, str) and isinstance(value, (int, float))):
                raise CheckpointError(
                    f"{path}: history: row {number}: {name!r:.80} is {value!r:.80}, expected a number"
                )


def _check_partial(partial: State, path: Path) -> None:
    """Raises unless these are a count of steps and sums by name."""
    count, sums = partial.get("count", 0), partial.get("sums", {})
    counts = partial.get("counts", sums)  # Older versions wrote none.
    named = isinstance(sums, dict) and isinstance(counts, dict) and set(counts) == set(sums)
    if type(count) is not int or count < 0 or not named:
        raise CheckpointError(
            f"{path}: partial: found {shown(partial)}, expected a count of steps, and sums and counts by name"
        )
    for name, value in [*sums.items(), *counts.items()]:
        if not (isinstance(name, str) and isinstance(value, (int, float))):
            raise CheckpointError(f"{path}: partial: {shown(name)} is {shown(value)}, expected a number")


def _check_entries(data: bytes, path: Path) -> None:
    """Raises unless the file's parts are stored as they are: compressed ones may unpack to any size."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, RuntimeError) as error:
        raise DamagedCheckpoint(
            f"checkpoint {path} is damaged: it is not a file of torch.save ({one_line(error)})"
        ) from None
    packed = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]
    if packed or sum(part.file_size for part in parts) > len(data):
        which = f"{packed[0]!r} is compressed" if packed else "its parts are larger than itself"
        raise CheckpointError(f"checkpoint {path}: {which}, expected what torch.save writes; refused")


def load_learner(learner: torch.nn.Module, state: dict[str, torch.Tensor], where: str | Path) -> None:
    """``load_whole_state`` with an error that names the first entry which does not fit."""
    own, optional = whole_state(learner), optional_state(learner)
    if isinstance(learner, MetaLearner):
        state = learner.current_state(state)
    for name in [*own, *state]:
        if name in optional and name not in state:
            continue
        found, expected = _shape(state, name), _shape(own, name)
        if found != expected:
            raise CheckpointError(f"{where} does not fit the learner: {name!r} is {found}, expected {expected}")
    _check_order(learner, state, own, where)
    load_whole_state(learner, state)


def _check_order(learner: torch.nn.Module, state: State, own: State, where: str | Path) -> None:
    """Raises where a rule keeps its rows by the order of the net's tensors, and they are registered in another one."""
    for module in learner.modules():
        names = getattr(module, "names", None)
        if not isinstance(names, tuple):
            continue
        rows = {f"module.net.{name}" for name in names}
        before, now = ([name for name in each if name in rows] for each in (state, own))
        if moved := [old for old, new in zip(before, now) if old != new]:
            raise CheckpointError(
                f"{where} does not fit the learner: the net registers {moved[0]!r} in another place than before, and "
                f"{type(module).__name__} keeps what it learnt by that order; put it back"
            )


def _shape(state: Mapping[str, Any], name: str) -> tuple[int, ...] | str:
    if name not in state:
        return "nothing"
    value = state[name]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def _canonical(tree: Any) -> Any:
    """The same tree in the same objects whatever its history.

    Pickle writes two equal strings differently from one string used twice, and a resumed run has the former.
    """
    if isinstance(tree, Mapping):
        return {_canonical(key): _canonical(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_canonical(value) for value in tree)
    return sys.intern(tree) if isinstance(tree, str) else tree
