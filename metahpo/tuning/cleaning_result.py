"""What ``clean`` found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import Dataset, Subset

from metahpo.errors import DataError
from metahpo.picture import Picture
from metahpo.training.metrics import Row
from metahpo.tuning.data import Labelled

_SHOWN, _LISTED = 40, 10


@dataclass(frozen=True)
class Cleaned:
    """A weight for every training example.

    weights: [N] in 0...1, in the order of the data set; threshold: below it an example is suspected; data: the
    examples; history: a row an update; warnings: a line each.
    """

    weights: Tensor
    threshold: float
    data: Labelled
    history: tuple[Row, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def suspected(self) -> Tensor:
        """The numbers of the examples whose weight is below the threshold, the least weight first."""
        order = torch.argsort(self.weights, stable=True)
        return order[self.weights[order] < self.threshold]

    @property
    def kept(self) -> Tensor:
        """The numbers of the others, ascending."""
        return (self.weights >= self.threshold).nonzero()[:, 0]

    def subset(self, dataset: Dataset[Any]) -> Subset[Any]:
        """The kept examples of the data set that was cleaned. Raises DataError for one of another size."""
        if len(dataset) != len(self.weights):  # type: ignore[arg-type]
            raise DataError(
                f"subset: found a data set of {len(dataset)} examples, expected the {len(self.weights)} cleaned ones"  # type: ignore[arg-type]
            )
        return Subset(dataset, self.kept.tolist())

    def against(self, wrong: Tensor) -> Row:
        """How well the suspected are the ``wrong`` ones (bool [N], where these are known): f1, precision, recall."""
        found = self.weights < self.threshold
        wrong = wrong.to(found.device)
        hits, told, there = (int(each.sum()) for each in (found & wrong, found, wrong))
        return {"f1": 2 * hits / max(told + there, 1), "precision": hits / max(told, 1), "recall": hits / max(there, 1)}

    def table(self) -> str:
        """By label how many examples are suspected, then the most suspected ones."""
        lines = ["| label | examples | suspected | share |", "| --- | --- | --- | --- |"]
        low = self.weights < self.threshold
        for label in self.data.y.unique().tolist():
            of = self.data.y == label
            found, count = int((low & of).sum()), int(of.sum())
            lines.append(f"| {label} | {count} | {found} | {found / count:.1%} |")
        lines.append(f"| all | {len(low)} | {int(low.sum())} | {float(low.double().mean()):.1%} |")
        lines += ["", "| most suspected: example | label | weight |", "| --- | --- | --- |"]
        for index in self.suspected[:_LISTED].tolist():
            lines.append(f"| {index} | {int(self.data.y[index])} | {float(self.weights[index]):.3g} |")
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
        return {"weights": self.weights.cpu(), "suspected": self.suspected.cpu(), "threshold": self.threshold}

    def _draw_weights(self) -> Figure:
        figure = Picture(figsize=(7, 3.5), dpi=100, layout="constrained")
        axis = figure.subplots()
        axis.hist(self.weights.cpu().numpy(), bins=50, range=(0, 1))
        axis.axvline(self.threshold, color="tab:red", linestyle=":")
        title = f"{len(self.suspected)} of {len(self.weights)} examples suspected"
        axis.set(xlabel="weight", ylabel="examples", xlim=(0, 1), title=title)
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
        axes = list(figure.subplots(rows, 10, squeeze=False).flat)
        for axis in axes:
            axis.set_axis_off()
        for axis, index in zip(axes, shown):
            image = self.data.x[index].detach().float().cpu().permute(1, 2, 0)
            image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-12)
            axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray_r")
            axis.set_title(f"{int(self.data.y[index])}", fontsize=10)
        figure.suptitle("most suspected, under their given labels")
        return figure
