"""An example of image completion: the pixels given, the image before and after adapting to them, and the truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from metahpo.learners.base import MetaLearner
from metahpo.learners.phase import Phase
from metahpo.picture import Picture
from metahpo.tasks.task import Task


@dataclass(frozen=True)
class CompletionExample:
    """Images [H, W]: ``given`` and ``truth``, NaN where the task has no pixel, and completions by kind.

    errors: the mean squared error over the query pixels, by kind.
    """

    given: np.ndarray
    truth: np.ndarray
    completed: dict[str, np.ndarray]
    errors: dict[str, float]


def completion_example(learner: MetaLearner, task: Task) -> CompletionExample | None:
    """The example of a task from two numbers to one; None unless its points fill at least a quarter of a grid."""
    points = torch.cat([task.support_x, task.query_x])
    sides = [points[:, axis].unique() for axis in (0, 1)]
    height, width = map(len, sides)
    if 4 * len(points) < height * width:
        return None
    answers, grid = learner.outputs(task, Phase()), torch.cartesian_prod(*sides)
    whole = learner.outputs(task._replace(query_x=grid, query_y=torch.zeros_like(grid[:, :1])), Phase())
    kinds = [kind for kind in ("before", "after") if kind in answers]

    def picture(x: Tensor, y: Tensor) -> np.ndarray:
        image = torch.full((height, width), torch.nan, dtype=y.dtype, device=y.device)
        image[tuple(torch.searchsorted(side, x[:, axis].contiguous()) for axis, side in enumerate(sides))] = y[:, 0]
        return image.cpu().numpy()

    return CompletionExample(
        picture(task.support_x, task.support_y),
        picture(points, torch.cat([task.support_y, task.query_y])),
        {kind: picture(grid, whole[kind]) for kind in kinds},
        {kind: (answers[kind] - task.query_y).square().mean().item() for kind in kinds},
    )


def draw_completion(data: CompletionExample) -> Figure:
    """The images in a row, in the truth's range of grey; pixels that are not given are blue."""
    panels = {f"{np.isfinite(data.given).sum()} pixels given": data.given}
    for kind, image in data.completed.items():
        panels[f"{kind} adapting, query MSE {data.errors[kind]:.3g}"] = image
    panels["truth"] = data.truth
    figure = Picture(figsize=(2.9 * len(panels), 3.2), dpi=100, layout="constrained")
    low, high = np.nanmin(data.truth), np.nanmax(data.truth)
    for axis, (title, image) in zip(figure.subplots(1, len(panels)), panels.items()):
        axis.set_facecolor("tab:blue")
        axis.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
        axis.set(title=title, xticks=[], yticks=[])
        axis.title.set_fontsize(10)
    return figure
