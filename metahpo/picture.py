"""Figures that show any text as it is."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from io import BytesIO
from typing import Any

from matplotlib.axis import Axis, Tick
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FuncFormatter, NullFormatter

LONGEST_TICK, LONGEST_LABEL, LONGEST_TEXT = 60, 80, 120
# Of subplots for images alone: matplotlib computes the ticks of an axis that is off too.
NO_TICKS = {"xticks": (), "yticks": ()}


class Picture(Figure):
    """A figure in which a name is never read as a formula, and never so long that nothing else fits.

    matplotlib takes what is between two dollar signs for mathematics. Its own labels of logarithmic
    axes are, and stay so.
    """

    def draw(self, renderer: Any) -> None:
        # Once alone, for matplotlib makes all ticks anew to find them.
        parts = self.findobj()
        axes = [part for part in parts if isinstance(part, Axis)]
        for axis in axes:
            _write_out(axis)
        labels = {axis.label for axis in axes}
        ticks = {label for part in parts if isinstance(part, Tick) for label in (part.label1, part.label2)}
        for text in parts:
            if isinstance(text, Text) and text not in ticks:
                _write_plainly(text, LONGEST_LABEL if text in labels else LONGEST_TEXT)
        with warnings.catch_warnings():
            # A font has not every script; the page beside the picture does.
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
            super().draw(renderer)


def spread_out(axis: Axis, values: Iterable[float]) -> None:
    """A logarithmic y axis with ticks at plain powers of ten where the values span two of them at least.

    Over less matplotlib would write odd multiples of powers; a linear axis has plain numbers.
    """
    values = list(values)
    if values and min(values) > 0 and max(values) > 100 * min(values):
        axis.axes.set_yscale("log")
        axis.set_minor_formatter(NullFormatter())


def png(figure: Figure) -> bytes:
    """The content of a PNG file of the figure."""
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _write_out(axis: Axis) -> None:
    """Ticks whose labels were set as texts show these."""
    formatter = axis.get_major_formatter()
    if not isinstance(formatter, (FixedFormatter, FuncFormatter)):
        return
    function = getattr(formatter, "func", None)
    if isinstance(function, partial) and function.args and isinstance(function.args[0], dict):
        # Where matplotlib keeps the labels that ``set_xticks`` was given.
        labels = function.args[0]
        labels.update({place: _cut(str(label), LONGEST_TICK) for place, label in labels.items()})
    for tick in axis.get_major_ticks():
        for label in (tick.label1, tick.label2):
            label.set_parse_math(False)
            label.set_usetex(False)


def _write_plainly(text: Text, most: int) -> None:
    text.set_parse_math(False)
    text.set_usetex(False)
    lines = text.get_text().split("\n")
    text.set_text("\n".join(_cut(line, most) for line in lines))


def _cut(text: str, most: int) -> str:
    """The text without its middle where it is longer than ``most``, and without lone surrogates."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 + 1 :]}"
