"""What ``clean`` found."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import Dataset, Subset

from metahpo.errors import DataError
from metahpo.picture import NO_TICKS, Picture
from metahpo.training.checkpoint import write_atomically
from metahpo.training.metrics import Row
from metahpo.tuning.data import Labelled

_SHOWN, _LISTED = 40, 10


class Suspect(NamedTuple):
    """An example whose label looks wrong: its number in the data set, its label, the probability that this is right,
    and the likeliest other label."""

    index: int
    label: int
    weight: float
    suggested_label: int


class Suspects(list[Suspect]):
    """The suspected examples, the least weight first."""

    def to_csv(self, path: str | Path) -> None:
        """Writes a row an example: index, label, weight, suggested_label."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([Suspect._fields, *self])
        write_atomically(Path(path), text.getvalue().encode())


@dataclass(frozen=True)
class Cleaned:
    """A weight for every training example.

    weights: [N] in 0...1, the probability that the example's label is right, in the order of the data set; threshold:
    below it an example is suspected; data: the examples; history: a row an update; warnings: a line each.
    gradient_weights: [N] in 0...1, as the gradient of the trusted examples' loss left them; suggested: [N], the
    likeliest label other than the given one. gain: by how much the cross-entropy of trusted examples that a net has not
    seen falls if the suspected ones are left out, its probabilities at their best temperature; error: the standard
    error of that.
    """

    weights: Tensor
    threshold: float
    data: Labelled
    history: tuple[Row, ...] = ()
    warnings: tuple[str, ...] = ()
    gradient_weights: Tensor = field(kw_only=True)
    suggested: Tensor = field(kw_only=True)
    gain: float = field(kw_only=True)
    error: float = field(kw_only=True)

    @property
    def keep_all(self) -> bool:
        """Whether to leave out the examples of low weight does harm beyond luck, or there are none: then none is
        suspected."""
        return not self.gain > -self.error

    @property
    def suspected(self) -> Tensor:
        """The numbers of the examples whose weight is below the threshold, the least weight first; none where all are
        to be kept (``keep_all``)."""
        order = torch.argsort(self.weights, stable=True)
        return order[self._low[order]]

    @property
    def kept(self) -> Tensor:
        """The numbers of the others, ascending."""
        return (~self._low).nonzero()[:, 0]

    @property
    def suspects(self) -> Suspects:
        """The suspected examples with their labels; ``suspects.to_csv(path)`` writes them down."""
        places = self.suspected
        columns = (places, self.data.y[places], self.weights[places], self.suggested[places])
        return Suspects(Suspect(*row) for row in zip(*(column.tolist() for column in columns)))

    @property
    def verdict(self) -> str:
        """What to do, in a sentence."""
        count, total = int((self.weights < self.threshold).sum()), len(self.weights)
        if not count:
            return f"keep all {total} examples: no label looks wrong"
        trusted = f"trusted examples' loss by {-self.gain:+.2g} ± {self.error:.2g}"
        if self.keep_all:
            return f"keep all {total} examples: to leave out the {count} likeliest wrong ones changes the {trusted}"
        return f"leave out or relabel {count} of {total} examples: that changes the {trusted}"

    @property
    def _low(self) -> Tensor:
        low = self.weights < self.threshold
        return torch.zeros_like(low) if self.keep_all else low

    def subset(self, dataset: Dataset[Any]) -> Subset[Any]:
        """The kept examples of the data set that was cleaned. Raises DataError for one of another size."""
        if len(dataset) != len(self.weights):  # type: ignore[arg-type]
            raise DataError(
                f"subset: found a data set of {len(dataset)} examples, expected the {len(self.weights)} cleaned ones"  # type: ignore[arg-type]
            )
        return Subset(dataset, self.kept.tolist())

    def against(self, wrong: Tensor) -> Row:
        """How well the suspected are the ``wrong`` ones (bool [N], where these are known): f1, precision, recall."""
        found = self._low
        wrong = wrong.to(found.device)
        hits, told, there = (int(each.sum()) for each in (found & wrong, found, wrong))
        return {"f1": 2 * hits / max(told + there, 1), "precision": hits / max(told, 1), "recall": hits / max(there, 1)}

    def table(self) -> str:
        """The verdict, by label how many examples are suspected, then the most suspected ones."""
        lines = [f"{self.verdict[0].upper()}{self.verdict[1:]}.", ""]
        lines += ["| label | examples | suspected | share |", "| --- | --- | --- | --- |"]
        low = self._low
        for label in self.data.y.unique().tolist():
            of = self.data.y == label
            found, count = int((low & of).sum()), int(of.sum())
            lines.append(f"| {label} | {count} | {found} | {found / count:.1%} |")
        lines.append(f"| all | {len(low)} | {int(low.sum())} | {float(low.double().mean()):.1%} |")
        lines += ["", "| most suspected: example | label | weight | suggested label |"]
        lines.append("| --- | --- | --- | --- |")
        for each in self.suspects[:_LISTED]:
            lines.append(f"| {each.index} | {each.label} | {each.weight:.3g} | {each.suggested_label} |")
        return "\n".join(lines)

    def pictures(self) -> dict[str, Figure]:
        """ "weights": their histogram; "curves": the trusted examples' loss by update; "suspected", where the examples
        are images: the most suspected ones with their labels."""
        found = {"weights": self._draw_weights()}
        if self.history:
            found["curves"] = self._draw_curves()
        if self.data.x.dim() == 4 and self.data.x.shape[1] in (1, 3) and len(self.suspected):
            found["suspected"] = self._draw_suspected()
        return found

    def tensors(self) -> dict[str, Any]:
        return {
            "weights": self.weights.cpu(),
            "suspected": self.suspected.cpu(),
            "threshold": self.threshold,
            "gradient_weights": self.gradient_weights.cpu(),
            "suggested": self.suggested.cpu(),
            "gain": self.gain,
            "error": self.error,
        }

    def _draw_weights(self) -> Figure:
        figure = Picture(figsize=(7, 3.5), dpi=100, layout="constrained")
        axis = figure.subplots()
        axis.hist(self.weights.cpu().numpy(), bins=50, range=(0, 1))
        axis.axvline(self.threshold, color="tab:red", linestyle=":")
        title = f"{len(self.suspected)} of {len(self.weights)} examples suspected"
        axis.set(xlabel="probability that the label is right", ylabel="examples", xlim=(0, 1), title=title)
        return figure

    def _draw_curves(self) -> Figure:
        figure = Picture(figsize=(7, 3.5), dpi=100, layout="constrained")
        axis = figure.subplots()
        updates = [row["iteration"] for row in self.history]
        axis.plot(updates, [row["train_loss"] for row in self.history], color="0.35", label="training, weighted")
        axis.plot(updates, [row["val_loss"] for row in self.history], color="tab:blue", label="trusted")
        axis.set(xlabel="update of the weights", title="cross-entropy")
        axis.legend(frameon=False)
        return figure

    def _draw_suspected(self) -> Figure:
        shown = self.suspected[:_SHOWN].tolist()
        rows = -(-len(shown) // 10)
        figure = Picture(figsize=(10, 0.4 + 1.3 * rows), dpi=100, layout="constrained")
        axes = list(figure.subplots(rows, 10, squeeze=False, subplot_kw=NO_TICKS).flat)
        for axis in axes:
            axis.set_axis_off()
        for axis, index in zip(axes, shown):
            image = self.data.x[index].detach().float().cpu().permute(1, 2, 0)
            image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-12)
            axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray_r")
            axis.set_title(f"{int(self.data.y[index])}, {int(self.suggested[index])}?", fontsize=10)
        figure.suptitle("most suspected, under their given and suggested labels")
        return figure
