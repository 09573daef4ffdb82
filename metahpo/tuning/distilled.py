"""What a dataset distillation found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from metahpo.functional.copies import copied
from metahpo.functional.trees import Params
from metahpo.picture import NO_TICKS, Picture
from metahpo.training.metrics import Row
from metahpo.tuning.image_training import IMAGES, LOG_RATES, ImageTraining

MOST_CLASSES, MOST_IMAGES = 20, 10


@dataclass(frozen=True)
class Distilled:
    """Synthetic images, and the training that was learnt with them.

    images: [classes * k, C, H, W], one of each class, then a second of each, and so on; labels: int64; rates: of each
    inner step; batches: for each inner step the positions of its images; net: the net, with the initial weights that
    the images are for; fixed: whether they are for those alone, or for any that its initialisation draws; history: a
    row for every outer step.
    """

    images: Tensor
    labels: Tensor
    rates: Tensor
    batches: tuple[Tensor, ...]
    net: nn.Module
    fixed: bool
    history: tuple[Row, ...]

    def train(self, net: nn.Module | None = None) -> nn.Module:
        """A copy of the net (default: the one distilled for), in evaluation mode, trained from its present weights on
        the images as learnt: plain gradient descent, one step a rate."""
        net = copied(self.net if net is None else net).eval()
        first = next(net.parameters())
        images, labels = self.images.to(first), self.labels.to(first.device)
        training = ImageTraining(net, labels, [which.to(first.device) for which in self.batches])
        training.check(images, int(labels.max()) + 1)
        hparams: Params = {IMAGES: images, LOG_RATES: self.rates.to(first).log()}
        fitted = training.fit(training.start([net]), hparams)
        with torch.no_grad():
            for name, p in fitted.items():
                own = net.get_parameter(name)
                own.copy_(p.view_as(own))
        return net

    def dataset(self) -> TensorDataset:
        """The images with their labels."""
        return TensorDataset(self.images, self.labels)

    def tensors(self) -> dict[str, Any]:
        """images, labels, rates, batches, and for a fixed initialisation "net", its state dict."""
        found = {"images": self.images.cpu(), "labels": self.labels.cpu(), "rates": self.rates.cpu()}
        net = {"net": {name: t.cpu() for name, t in self.net.state_dict().items()}} if self.fixed else {}
        return {**found, "batches": list(self.batches), **net}

    def table(self) -> str:
        """The learnt rates by step, under a line on the images."""
        count, size = len(self.images), " x ".join(map(str, self.images.shape[1:]))
        for_what = "the net's own initial weights" if self.fixed else "random initial weights"
        losses = ""
        if self.history:
            ends = [self.history[0]["val_loss"], self.history[-1]["val_loss"]]
            losses = f"; loss on real data {ends[0]:.4f} in the first outer step, {ends[1]:.4f} in the last"
        lines = [f"{count} images of {size} for {for_what}{losses}", "", "| inner step | images | rate |"]
        lines += ["| ---: | ---: | ---: |"]
        pairs = zip(self.batches, self.rates.tolist())
        return "\n".join(
            lines + [f"| {step} | {len(which)} | {rate:.4g} |" for step, (which, rate) in enumerate(pairs, 1)]
        )

    def pictures(self) -> dict[str, Figure]:
        """ "images": a sheet with labels (of many classes or images the first); "loss": on real data by outer step."""
        return {"images": draw_images(self.images, self.labels)} | (
            {"loss": draw_loss(self.history)} if self.history else {}
        )


def draw_images(images: Tensor, labels: Tensor) -> Figure:
    """Images [n, C, H, W] with the label over each; a column a class, or one image a class in several rows.

    Learnt pixels go beyond those of real data. Grey images share a scale that is centred on 0 and shown beside them;
    coloured ones are each scaled into 0..1.
    """
    classes = sorted(set(labels.tolist()))[:MOST_CLASSES]
    by_class = [(labels == label).nonzero()[:MOST_IMAGES, 0].tolist() for label in classes]
    rows = max(map(len, by_class))
    cells = [(which[row], row, column) for column, which in enumerate(by_class) for row in range(len(which))]
    columns = len(classes)
    if rows == 1 and columns > 5:
        columns = min(math.ceil(columns / 2), 10)
        rows = math.ceil(len(cells) / columns)
        cells = [(which, at // columns, at % columns) for at, (which, _, _) in enumerate(cells)]
    return _sheet(images, labels, cells, (rows, columns))


def _sheet(images: Tensor, labels: Tensor, cells: Sequence[tuple[int, int, int]], shape: tuple[int, int]) -> Figure:
    rows, columns = shape
    pixels = images.detach().float().cpu().permute(0, 2, 3, 1)
    coloured = pixels.shape[-1] == 3
    side = 1.5 if columns <= 5 else 1.0
    figure = Picture(figsize=(side * columns + 1.2, (side + 0.28) * rows + 0.4), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, subplot_kw=NO_TICKS)
    for axis in axes.flat:
        axis.set_axis_off()
    reach, shown = float(pixels.abs().max()), None
    for which, row, column in cells:
        axis, image = axes[row, column], pixels[which]
        axis.set_title(str(int(labels[which])), fontsize=11, pad=3)
        if coloured:
            low, high = image.min(), image.max()
            axis.imshow(((image - low) / (high - low).clamp_min(1e-12)).numpy())
        else:
            shown = axis.imshow(image.mean(-1).numpy(), cmap="RdBu_r", vmin=-reach, vmax=reach)
    if shown is not None:
        figure.colorbar(shown, ax=axes, fraction=0.04, label="pixel")
    return figure


def draw_loss(history: Sequence[Row]) -> Figure:
    """The loss on real data by outer step, and the accuracy on validation data where it was measured."""
    steps = [row["iteration"] for row in history]
    measured = "val_accuracy" in history[0]
    figure = Picture(figsize=(5.6 * (1 + measured), 3.8), dpi=110, layout="constrained")
    axes = figure.subplots(1, 1 + measured, squeeze=False)[0]
    losses = [row["val_loss"] for row in history]
    marker = "." if len(steps) < 30 else None
    axes[0].plot(steps, losses, color="tab:blue", linewidth=1.2, marker=marker)
    axes[0].set(title="loss on batches of the real data", yscale="log" if min(losses) > 0 else "linear")
    if measured:
        accuracies = [row["val_accuracy"] for row in history]
        axes[1].plot(steps, accuracies, color="tab:blue", linewidth=1.2, marker=marker)
        axes[1].set(title="accuracy on validation data", ylim=(0, 1))
    for axis in axes:
        axis.set_xlabel("outer step")
        axis.grid(alpha=0.25)
    return figure
