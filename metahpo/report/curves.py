"""Learning curves by epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from metahpo.picture import Picture
from metahpo.training.metrics import best_epochs, judged_by

STYLES: dict[str, dict[str, Any]] = {
    "train": {"color": "0.35"},
    "val": {"color": "tab:blue"},
    "val, transductive": {"color": "tab:blue"},
    "val, inductive": {"color": "tab:orange"},
    "val, before adapting": {"color": "0.6", "linestyle": ":"},
    "outer rate": {"color": "tab:green"},
}


@dataclass(frozen=True)
class Line:
    """One curve: values [epochs] (NaN where a row has none), and half widths [epochs] of its 95% intervals or None."""

    label: str
    values: np.ndarray
    half_widths: np.ndarray | None = None


@dataclass(frozen=True)
class Panel:
    """The curves that share an axis.

    name: "loss", "accuracy", "return" or "outer learning rate"; log: on a logarithmic axis.
    """

    name: str
    lines: tuple[Line, ...]
    log: bool = False


@dataclass(frozen=True)
class Curves:
    """The learning curves of a run: epochs [epochs], and the best of them by validation."""

    epochs: np.ndarray
    panels: tuple[Panel, ...]
    best_epoch: int


def learning_curves(history: Sequence[Mapping[str, float]]) -> Curves:
    """The curves of a history, whose rows are those of metrics.csv.

    Where every prediction is independent of the others, inductive validation is the same as transductive and is left
    out. The loss axis is logarithmic if the losses span more than a decade.
    """
    judged = judged_by(history[0])
    losses = [_line(history, "train", "train_loss"), _line(history, "val", "val_loss")]
    if judged == "loss":
        losses.append(_line(history, "val, before adapting", "val_loss_before", interval=False))
    panels = [_panel("loss", losses, may_be_log=True)]
    if judged == "return":
        before = _line(history, "val, before adapting", "val_return_before", interval=False)
        returns = [_line(history, "train", "train_return"), _line(history, "val", "val_return"), before]
        # The outer loss is no measure of progress; that of validation is minus these.
        panels = [_panel("return", returns)]
    if judged == "accuracy":
        panels.append(_panel("accuracy", [_line(history, "train", "train_accuracy"), *_val_accuracies(history)]))
    panels.append(_panel("outer learning rate", [_line(history, "outer rate", "lr")]))
    epochs = np.array([row["epoch"] for row in history])
    return Curves(epochs, tuple(panel for panel in panels if panel.lines), best_epochs(history, 1)[0])


def draw_curves(curves: Curves) -> Figure:
    """The panels side by side."""
    widths = [2 if panel.name == "outer learning rate" else 3 for panel in curves.panels]
    figure = Picture(figsize=(11.5, 4.4), dpi=100, layout="constrained")
    axes = figure.subplots(1, len(curves.panels), width_ratios=widths, squeeze=False)[0]
    for axis, panel in zip(axes, curves.panels):
        _draw_panel(axis, panel, curves)
    return figure


def _val_accuracies(history: Sequence[Mapping[str, float]]) -> list[Line | None]:
    before = _line(history, "val, before adapting", "val_accuracy_before", interval=False)
    whole = _line(history, "val, transductive", "val_accuracy")
    alone = _line(history, "val, inductive", "val_accuracy_inductive")
    if whole and alone and not np.array_equal(whole.values, alone.values, equal_nan=True):
        return [whole, alone, before]
    return [_line(history, "val", "val_accuracy"), before]


def _line(history: Sequence[Mapping[str, float]], label: str, key: str, interval: bool = True) -> Line | None:
    """The column ``key``, or None where no row has it."""
    if not any(key in row for row in history):
        return None
    half_widths = _column(history, f"{key}_ci") if interval else np.array([])
    return Line(label, _column(history, key), half_widths if np.isfinite(half_widths).any() else None)


def _column(history: Sequence[Mapping[str, float]], key: str) -> np.ndarray:
    return np.array([row.get(key, math.nan) for row in history], dtype=float)


def _panel(name: str, lines: Sequence[Line | None], may_be_log: bool = False) -> Panel:
    found = tuple(line for line in lines if line is not None)
    return Panel(name, found, may_be_log and _spans_a_decade(found))


def _spans_a_decade(lines: Sequence[Line]) -> bool:
    values = np.concatenate([line.values for line in lines])
    values = values[np.isfinite(values)]
    return len(values) > 0 and bool(values.min() > 0) and bool(values.max() > 10 * values.min())


def _draw_panel(axis: Axes, panel: Panel, curves: Curves) -> None:
    single = len(curves.epochs) == 1
    marker = "." if len(curves.epochs) <= 30 else None
    for line in panel.lines:
        style = STYLES[line.label]
        axis.plot(curves.epochs, line.values, label=line.label, marker=marker, linewidth=1.6, **style)
        if line.half_widths is not None and single:
            axis.errorbar(curves.epochs, line.values, line.half_widths, capsize=4, **style)
        elif line.half_widths is not None:
            low, high = line.values - line.half_widths, line.values + line.half_widths
            if (
                panel.log
            ):  # An interval that reaches below zero has no place on a logarithmic axis: cut it at the smallest value.
                low = np.maximum(low, np.nanmin(line.values) / 2)
            axis.fill_between(curves.epochs, low, high, color=style["color"], alpha=0.2, linewidth=0)
    if single:
        axis.set_xlim(curves.epochs[0] - 1, curves.epochs[0] + 1)
    else:
        label = f"best epoch ({curves.best_epoch})" if panel.name != "outer learning rate" else None
        axis.axvline(curves.best_epoch, color="0.5", linewidth=0.9, linestyle="--", label=label, zorder=0)
    axis.set(title=panel.name, xlabel="epoch", yscale="log" if panel.log else "linear")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axis.grid(alpha=0.25)
    if panel.name == "accuracy":
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if _wide(axis) else 1))
    if panel.name == "outer learning rate":
        axis.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        axis.set_ylim(bottom=0)
    else:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)


def _wide(axis: Axes) -> bool:
    """Whether whole percents tell the ticks of the axis apart."""
    low, high = axis.get_ylim()
    return high - low > 0.08
