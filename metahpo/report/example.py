"""An example task with a learner's predictions, before and after adapting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from metahpo.learners.base import MetaLearner
from metahpo.learners.phase import Phase
from metahpo.learners.policy_maml import PolicyMAML
from metahpo.picture import Picture
from metahpo.report.completion import CompletionExample, completion_example, draw_completion
from metahpo.report.paths import PathsExample, draw_paths, paths_example
from metahpo.rl import Navigation
from metahpo.tasks.task import Task

KINDS = ("after", "before")
MOST_COLUMNS = 8
MOST_SUPPORT = 24
MOST_QUERIES = 16


@dataclass(frozen=True)
class Prediction:
    """Predicted labels [n] of the queries shown, their probabilities [n], and the accuracy over the whole query set."""

    labels: np.ndarray
    confidences: np.ndarray
    accuracy: float


@dataclass(frozen=True)
class ImageExample:
    """Images [n, H, W] or [n, H, W, 3] in 0..1 with their labels [n], evenly over the classes; predictions by kind.

    columns: of the grid in which each row holds the classes in order; support_size: images of the whole support set.
    """

    support: np.ndarray
    support_labels: np.ndarray
    query: np.ndarray
    query_labels: np.ndarray
    predictions: dict[str, Prediction]
    columns: int
    support_size: int


@dataclass(frozen=True)
class CurveExample:
    """A regression task from one number to one: predicted curves [n] over x [n] by kind, and its points.

    errors: the mean squared error over the query points, by kind.
    """

    x: np.ndarray
    curves: dict[str, np.ndarray]
    support_x: np.ndarray
    support_y: np.ndarray
    query_x: np.ndarray
    query_y: np.ndarray
    errors: dict[str, float]


Example = ImageExample | CurveExample | CompletionExample | PathsExample


@torch.no_grad()
def example(learner: MetaLearner, task: Task) -> Example | None:
    """The example of one task; None unless it is to navigate, or maps images to labels, or one number or places of a
    grid to a number."""
    device = next((p.device for p in learner.parameters()), task.support_x.device)
    task = task.to(device)
    if isinstance(learner, PolicyMAML):
        return paths_example(learner, task) if isinstance(learner.environment, Navigation) else None
    if task.query_y.is_floating_point():
        single = all(t.numel() == len(t) for t in task)
        if not single and task.query_x.shape[1:] == (2,) and task.query_y.shape[1:] == (1,):
            return completion_example(learner, task)
        return _curve_example(learner, task) if single else None
    if task.query_x.dim() == 4 and task.query_x.shape[1] in (1, 3):
        return _image_example(learner, task)
    return None


def draw_example(data: Example) -> Figure:
    """The picture of an example."""
    if isinstance(data, CompletionExample):
        return draw_completion(data)
    if isinstance(data, PathsExample):
        return draw_paths(data)
    return _draw_images(data) if isinstance(data, ImageExample) else _draw_curves(data)


def _image_example(learner: MetaLearner, task: Task) -> ImageExample:
    ways = len(torch.unique(torch.cat([task.support_y, task.query_y])))
    # Whole rounds of the classes make a row, so that a column holds one class.
    columns = ways * (MOST_COLUMNS // ways) if ways <= MOST_COLUMNS else MOST_COLUMNS
    # Of every class as many support images, if there is room; of the queries whole rows.
    room = MOST_SUPPORT // ways * ways or MOST_SUPPORT
    support = _in_turn(task.support_y)[:room]
    query = _in_turn(task.query_y)[: MOST_QUERIES // columns * columns]
    outputs = learner.outputs(task, Phase())
    return ImageExample(
        _pixels(task.support_x)[support],
        task.support_y.cpu().numpy()[support],
        _pixels(task.query_x)[query],
        task.query_y.cpu().numpy()[query],
        {kind: _prediction(outputs[kind], task.query_y, query) for kind in KINDS if kind in outputs},
        columns,
        len(task.support_y),
    )


def _in_turn(labels: Tensor) -> np.ndarray:
    """Positions in ``labels``: the first of each class in order of class, then the second of each, and so on."""
    found = labels.cpu().numpy()
    order = np.argsort(found, kind="stable")
    ranked = found[order]
    rank = np.arange(len(found)) - np.searchsorted(ranked, ranked)
    return order[np.lexsort((ranked, rank))]


def _pixels(images: Tensor) -> np.ndarray:
    """Images [N, C, H, W] as matplotlib takes them; if any is outside 0..1 (normalised data) all are scaled into it."""
    images = images.float().cpu()
    low, high = images.min(), images.max()
    if low < 0 or high > 1:
        images = (images - low) / (high - low)
    pixels = images.permute(0, 2, 3, 1).numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def _prediction(logits: Tensor, labels: Tensor, chosen: np.ndarray) -> Prediction:
    confidences, predicted = logits.float().softmax(-1).max(-1)
    accuracy = (predicted == labels).double().mean().item()
    return Prediction(predicted.cpu().numpy()[chosen], confidences.cpu().numpy()[chosen], accuracy)


def _curve_example(learner: MetaLearner, task: Task) -> CurveExample:
    every_x = torch.cat([task.support_x.flatten(), task.query_x.flatten()])
    margin = 0.03 * (every_x.max() - every_x.min())
    x = torch.linspace(float(every_x.min() - margin), float(every_x.max() + margin), 200).to(task.query_x)
    shape = (-1, *task.query_x.shape[1:])
    curves = learner.outputs(
        task._replace(query_x=x.reshape(shape), query_y=torch.zeros_like(x).reshape(shape)), Phase()
    )
    answers, targets = learner.outputs(task, Phase()), task.query_y.flatten()
    kinds = [kind for kind in KINDS if kind in answers]
    return CurveExample(
        _numbers(x),
        {kind: _numbers(curves[kind]) for kind in kinds},
        _numbers(task.support_x),
        _numbers(task.support_y),
        _numbers(task.query_x),
        _numbers(task.query_y),
        {kind: (answers[kind].flatten() - targets).square().mean().item() for kind in kinds},
    )


def _numbers(values: Tensor) -> np.ndarray:
    return values.detach().flatten().cpu().numpy()


def _draw_curves(data: CurveExample) -> Figure:
    figure = Picture(figsize=(11, 5), dpi=100, layout="constrained")
    axis = figure.subplots()
    styles = {"after": {"color": "tab:blue", "linewidth": 2}, "before": {"color": "0.5", "linestyle": "--"}}
    axis.scatter(data.query_x, data.query_y, s=14, color="0.2", alpha=0.7, linewidths=0, label="query points (true)")
    for kind, curve in data.curves.items():
        label = f"{kind} adapting, query MSE {data.errors[kind]:.3g}"
        axis.plot(data.x, curve, label=label, **styles[kind])
    axis.scatter(
        data.support_x, data.support_y, s=60, color="tab:orange", edgecolor="white", zorder=3, label="support points"
    )
    axis.set(xlabel="x", ylabel="y")
    axis.grid(alpha=0.25)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.1), ncols=4, frameon=False)
    return figure


class _Grid:
    """Places pictures in rows from the top, in inches, so that captions never meet whatever the number of rows."""

    width, head, gap, line = 11.0, 0.45, 0.12, 0.2

    def __init__(self, data: ImageExample):
        self.columns, self.top = data.columns, 0.0
        self.cell = self.width / data.columns
        self.side = min(1.35, self.cell - 0.2)
        rows = [-(-len(labels) // data.columns) for labels in (data.support_labels, data.query_labels)]
        self.support_step = self.side + self.line + self.gap
        self.query_step = self.support_step + len(data.predictions) * self.line
        height = 2 * self.head + rows[0] * self.support_step + rows[1] * self.query_step
        self.figure = Picture(figsize=(self.width, height), dpi=100)
        # One axis for all, in inches from the upper left: an axis for each picture takes ten times as long to draw.
        self.axis = self.figure.add_axes((0, 0, 1, 1), xlim=(0, self.width), ylim=(height, 0), autoscale_on=False)
        self.axis.axis("off")

    def title(self, text: str) -> None:
        self.axis.text(0.1, self.top + 0.3, text, fontsize=11, weight="bold")
        self.top += self.head

    def places(self, count: int, step: float) -> Iterator[tuple[float, float]]:
        """The upper left corner of each of ``count`` pictures; moves on below them."""
        for index in range(count):
            row, column = divmod(index, self.columns)
            yield column * self.cell + (self.cell - self.side) / 2, self.top + self.line + row * step
        self.top += -(-count // self.columns) * step

    def picture(self, left: float, top: float, image: np.ndarray, title: str, colour: str) -> None:
        extent = (left, left + self.side, top + self.side, top)
        self.axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto", extent=extent)
        frame = Rectangle((left, top), self.side, self.side, fill=False, edgecolor=colour, linewidth=2.5)
        self.axis.add_patch(frame)
        self.caption(left, top - 0.05, title, "black")

    def caption(self, left: float, bottom: float, text: str, colour: str) -> None:
        self.axis.text(left + self.side / 2, bottom, text, ha="center", color=colour, fontsize=9)


def _draw_images(data: ImageExample) -> Figure:
    grid = _Grid(data)
    shown = len(data.support_labels)
    some = "" if shown == data.support_size else f" ({shown} of {data.support_size} shown)"
    grid.title(f"Support set{some}")
    for (left, top), image, label in zip(grid.places(shown, grid.support_step), data.support, data.support_labels):
        grid.picture(left, top, image, f"class {label}", "0.7")
    accuracies = ", ".join(f"{p.accuracy:.0%} {kind} adapting" for kind, p in data.predictions.items())
    grid.title(f"Queries (accuracy over the whole query set: {accuracies})")
    for index, (left, top) in enumerate(grid.places(len(data.query_labels), grid.query_step)):
        label = data.query_labels[index]
        right = data.predictions["after"].labels[index] == label
        grid.picture(left, top, data.query[index], f"class {label}", _colour(right))
        for line, (kind, prediction) in enumerate(data.predictions.items(), start=1):
            right = prediction.labels[index] == label
            # A mark besides the colour, for those who do not tell green from red.
            text = f"{'✓' if right else '✗'} {kind}: {prediction.labels[index]} ({prediction.confidences[index]:.0%})"
            grid.caption(left, top + grid.side + line * grid.line, text, _colour(right))
    return grid.figure


def _colour(right: bool) -> str:
    return "#1a7f37" if right else "#cf222e"
