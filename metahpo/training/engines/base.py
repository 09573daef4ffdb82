"""What an engine is: a way to run a learner over a batch of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from metahpo.functional import Params
from metahpo.functional.buffers import merged_buffers
from metahpo.functional.trees import map_tree, stack_trees
from metahpo.learners.base import MetaLearner, Metrics
from metahpo.learners.phase import Phase
from metahpo.tasks.task import Task


class MetaGradient(NamedTuple):
    """The outer gradient of a batch of T tasks.

    loss: the mean over tasks, scalar; grads: its gradient by the names of ``learner.outer_params()``, zeros where
    unused; metrics: means over tasks, and under "buffers" the new value of each buffer (``merged_buffers``); losses:
    [T], each task's own.
    """

    loss: Tensor
    grads: Params
    metrics: Metrics
    losses: Tensor


class Engine(Protocol):
    """All engines give the same numbers to rounding; they differ in speed and memory."""

    name: str

    def meta_gradient(self, learner: MetaLearner, tasks: Task, phase: Phase) -> MetaGradient:
        """The outer gradient over a batch of tasks [T, N, ...]."""
        ...

    def evaluate(self, learner: MetaLearner, tasks: Task, phase: Phase) -> tuple[Metrics, Params]:
        """Each task's metrics, [T] by name, and its query outputs, [T, N, ...] by kind (``MetaLearner.outputs``)."""
        ...


def mean_metrics(rows: Sequence[Metrics]) -> Metrics:
    """The means over tasks of their metrics, and under "buffers" what the tasks make of the buffers."""
    buffers = [row.pop("buffers", {}) for row in rows]
    return merged_metrics({**stack_trees(rows), "buffers": stack_trees(buffers)})


def merged_metrics(metrics: Metrics) -> Metrics:
    """As ``mean_metrics``, of metrics [T, ...] by name."""
    scalars = {name: values for name, values in metrics.items() if name != "buffers"}
    return {**map_tree(mean, scalars), "buffers": merged_buffers(metrics.get("buffers", {}))}


def mean(tensor: Tensor) -> Tensor:
    """The mean over tasks [T, ...], without its gradient."""
    return tensor.detach().mean(0)
