"""What an engine is: a way to run a learner over a batch of tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from metahpo.functional import Params
from metahpo.functional.buffers import merged_buffers
from metahpo.functional.trees import stack_trees
from metahpo.learners.base import MetaLearner, Metrics
from metahpo.learners.phase import Phase
from metahpo.tasks.task import Task
from metahpo.training.metrics import is_loss


class MetaGradient(NamedTuple):
    """The outer gradient of a batch of T tasks.

    loss: the mean over tasks, scalar; grads: its gradient by the names of ``learner.outer_params()``, zeros where
    unused; metrics: means over tasks, and under "buffers" the new value of each buffer (``merged_buffers``); losses:
    [T], each task's own; unused: the parameters that no task used.
    """

    loss: Tensor
    grads: Params
    metrics: Metrics
    losses: Tensor
    unused: tuple[str, ...] = ()


class Engine(Protocol):
    """All engines give the same numbers to rounding; they differ in speed and memory."""

    name: str

    def meta_gradient(self, learner: MetaLearner, tasks: Task, phase: Phase) -> MetaGradient:
        """The outer gradient over a batch of tasks [T, N, ...]."""
        ...

    def evaluate(self, learner: MetaLearner, tasks: Task, phase: Phase) -> tuple[Metrics, Params]:
        """Each task's metrics, [T] by name, and its query outputs, [T, N, ...] by kind (``MetaLearner.outputs``)."""
        ...


def prepare(learner: MetaLearner, tasks: Task, phase: Phase) -> None:
    """Sets the learner's mode, and lets it look at an example; every engine does so first."""
    learner.train(phase.training)
    learner.look_at(tasks.support_x[0])


def gradients(loss: Tensor, params: Params) -> tuple[list[Tensor], set[str]]:
    """The gradient of ``loss`` in each parameter, zeros where unused, and the names of those that are used."""
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    used = {name for name, g in zip(params, found) if g is not None}
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params.values(), found)], used


def mean_metrics(rows: Sequence[Metrics]) -> Metrics:
    """The means over tasks of their metrics, and under "buffers" what the tasks make of the buffers."""
    buffers = [row.pop("buffers", {}) for row in rows]
    return merged_metrics({**stack_metrics(rows), "buffers": stack_trees(buffers)})


def stack_metrics(rows: Sequence[Metrics]) -> Metrics:
    """The tasks' metrics, [T] by name: NaN for a task that does not have one that another has."""
    names = dict.fromkeys(name for row in rows for name in row)
    if all(len(row) == len(names) for row in rows):
        return stack_trees(rows)
    like = {name: next(row[name] for row in rows if name in row) for name in names}
    none = {name: torch.full_like(value, math.nan) for name, value in like.items()}
    return stack_trees([{**none, **row} for row in rows])


def merged_metrics(metrics: Metrics) -> Metrics:
    """As ``mean_metrics``, of metrics [T] by name; a metric's mean is over the tasks that have it (``summarise``)."""
    scalars = {name: values for name, values in metrics.items() if name != "buffers"}
    means = {name: mean(values) if is_loss(name) else values.detach().nanmean(0) for name, values in scalars.items()}
    return {**means, "buffers": merged_buffers(metrics.get("buffers", {}))}


def mean(tensor: Tensor) -> Tensor:
    """The mean over tasks [T, ...], without its gradient."""
    return tensor.detach().mean(0)
