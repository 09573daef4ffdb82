"""Means with confidence intervals, and the log of a run."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metahpo.errors import DataError
from metahpo.training.checkpoint import write_atomically

Row = dict[str, float]


def summarise(metrics: Mapping[str, Tensor]) -> Row:
    """The mean over tasks of each metric [T], and as NAME_ci half the width of its 95% interval (normal, n - 1).

    A metric but the losses is NaN for tasks that have none: its mean is over the others, and there is none if no task
    has one.
    """
    row: Row = {}
    for name, values in metrics.items():
        values = values.double()
        if not is_loss(name):
            values = values[~values.isnan()]
            if not len(values):
                continue
        row[name] = values.mean().item()
        count = len(values)
        row[f"{name}_ci"] = 1.96 * values.std().item() / math.sqrt(count) if count > 1 else math.nan
    return row


def filled(parts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same names in all: NaN for tasks that do not have a metric that others have."""
    names = dict.fromkeys(name for part in parts for name in part)
    for part in parts:
        for name in names.keys() - part.keys():
            part[name] = torch.full_like(next(iter(part.values())), math.nan)
    return [{name: part[name] for name in names} for part in parts]


def is_loss(name: str) -> bool:
    """Whether a metric is the loss, "loss" or "loss_KIND", which is never left out."""
    return name == "loss" or name.startswith("loss_")


# What a learner is judged by, the first of them that it has, and whether more is better (1) or worse (-1).
JUDGED = {"accuracy": 1, "return": 1, "loss": -1}


def judged_by(row: Mapping[str, float]) -> str:
    """The name in ``JUDGED`` of what validation ranks epochs by, of a row of the history."""
    return next(name for name in JUDGED if name == "loss" or f"val_{name}" in row)


def score(row: Mapping[str, float]) -> float:
    """The figure that validation ranks epochs by, of which more is better."""
    name = judged_by(row)
    value = JUDGED[name] * row[f"val_{name}"]
    return -math.inf if math.isnan(value) else value


def best_epochs(history: Sequence[Mapping[str, float]], count: int) -> list[int]:
    """The ``count`` best epochs of a history by validation, best first; of equals the earlier."""
    ranked = sorted(history, key=lambda row: (-score(row), row["epoch"]))
    return [int(row["epoch"]) for row in ranked[:count]]


class SumOfMetrics:
    """Running means of scalar tensors, kept on their device until read; float64, so that they can be stored exactly.

    count: updates added. counts: by name, in how many of them a metric was there and no NaN (``summarise``).
    """

    def __init__(
        self, count: int = 0, sums: Mapping[str, float] | None = None, counts: Mapping[str, float] | None = None
    ):
        self.count = count
        self._sums: dict[str, Tensor | float] = dict(sums or {})
        # Those of a checkpoint that does not say: all.
        self._counts: dict[str, Tensor | float] = dict(counts or dict.fromkeys(self._sums, float(count)))

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        self.count += 1
        for name, value in metrics.items():
            value, there = value.detach().to(torch.float64), 1.0
            if not is_loss(name):
                there = (~value.isnan()).to(torch.float64)
                value = value.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0.0) + there

    def state(self) -> dict[str, Any]:
        """The arguments that make this again."""
        return {"count": self.count, "sums": _floats(self._sums), "counts": _floats(self._counts)}

    def means(self) -> Row:
        counts = _floats(self._counts)
        return {name: value / counts[name] for name, value in _floats(self._sums).items() if counts[name]}


def _floats(values: Mapping[str, Tensor | float]) -> Row:
    return {name: float(value) for name, value in values.items()}


class CsvLog:
    """metrics.csv: one row an epoch. Rewritten whole each time, so that it is never torn."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, rows: Sequence[Mapping[str, float]]) -> None:
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _plain(value) for name, value in row.items()} for row in rows)
        write_atomically(self.path, text.getvalue().encode())

    def restore(self, history: Sequence[Mapping[str, float]]) -> list[float]:
        """Makes the file that of ``history``, a checkpoint's, if it is not, and says so; gives each row's seconds.

        A row too many or too few at the end is a crash's, and no damage.
        """
        problem, rows = None, list[Row]()
        try:
            rows = self.read()
        except DataError as error:
            problem = str(error)
        logged = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
        kept = [{name: float(value) for name, value in row.items()} for row in history]
        wrong = next((i for i, (a, b) in enumerate(zip(logged, kept), start=1) if repr(a) != repr(b)), None)
        if problem is None and wrong is not None:
            problem = f"{self.path}: row {wrong} is not what the checkpoint says"
        elif problem is None and len(logged) < len(kept) - 1:
            problem = f"{self.path}: has {len(logged)} rows, the checkpoint {len(kept)}"
        seconds = [row.get("seconds", 0.0) for row in rows[: len(kept)]]
        seconds = [value if 0 <= value < math.inf else 0.0 for value in seconds]
        seconds += [0.0] * (len(kept) - len(seconds))
        if problem is not None:
            print(f"{problem}; written again from the checkpoint", file=sys.stderr)
        if problem is not None or logged != kept:
            self.write([{**row, "seconds": s} for row, s in zip(history, seconds)])
        return seconds

    def read(self) -> list[Row]:
        """The rows of the file, none if it does not exist; raises DataError if it is damaged."""
        if not self.path.exists():
            return []
        try:
            with open(self.path, newline="") as file:
                return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
        except (ValueError, TypeError, csv.Error) as error:  # UnicodeDecodeError is a ValueError.
            raise DataError(f"{self.path} is damaged: {error}") from None


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() and abs(value) < 1e9 else value
