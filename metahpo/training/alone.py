"""Whether the outputs that a learner calls inductive are those of each query alone."""

from __future__ import annotations

import warnings
import weakref

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metahpo.functional.buffers import copied_buffers
from metahpo.functional.trees import Params
from metahpo.inner.randomness import python_draws_kept
from metahpo.learners.base import MetaLearner, Metrics
from metahpo.learners.phase import Phase
from metahpo.tasks.task import Task
from metahpo.training.distributed import Ranks

# Kernels for other numbers of examples sum in other orders, most of all in the lower types of autocast.
_TOLERANCE = 0.05

_gaps: weakref.WeakKeyDictionary[MetaLearner, float] = weakref.WeakKeyDictionary()


def without_false_inductive(
    learner: MetaLearner, tasks: Task, metrics: Metrics, outputs: Params, ranks: Ranks
) -> tuple[Metrics, Params]:
    """The results of a batch of tasks, without the inductive ones, and with a warning, if the first task shows that a
    query's depend on the other queries. Looks once for each learner."""
    if "inductive" not in outputs:
        return metrics, outputs
    if learner not in _gaps:
        try:
            gap = inductive_gap(learner, tasks.select(0))
        except Exception:
            gap = 0.0  # It cannot take another number of queries, which says nothing of the figures.
        _gaps[learner] = max(ranks.each(gap))
        if _gaps[learner] > _TOLERANCE:
            warnings.warn(
                f"{type(learner).__name__}: outputs 'inductive' of some queries differ by {_gaps[learner]:.0%} without "
                "the others, so they are not of each query alone and are left out; the learner or its net reads the "
                "query set as a whole, or its places (override outputs to give other kinds)",
                stacklevel=4,
            )
    if _gaps[learner] <= _TOLERANCE:
        return metrics, outputs
    metrics = {name: value for name, value in metrics.items() if not name.endswith("_inductive")}
    return metrics, {kind: value for kind, value in outputs.items() if kind != "inductive"}


@torch.no_grad()
def inductive_gap(learner: MetaLearner, task: Task) -> float:
    """How far the "inductive" outputs of a task's queries move, relatively to the largest, where half of them alone are
    there, in the opposite order; 0 without such outputs, and where the learner draws random numbers."""
    count = len(task.query_y)
    # Batch norm has no statistics of one value.
    half = range(count)[-max(count // 2, 1 + learner.batch_dependent) :][::-1]
    which = torch.tensor(half, device=task.query_y.device)
    part = task._replace(query_x=task.query_x[which], query_y=task.query_y[which])
    devices = [task.query_x.device] if task.query_x.is_cuda else []
    found: list[list[Tensor]] = []
    learner.eval().look_at(task.support_x)
    with torch.random.fork_rng(devices=devices), python_draws_kept():
        before = torch.get_rng_state()
        for each in (task, part):
            with copied_buffers(learner):
                found.append(tree_leaves(learner.outputs(each, Phase()).get("inductive", [])))
        if not torch.equal(before, torch.get_rng_state()):
            return 0.0
    gaps = [0.0]
    for whole, alone in zip(*found):
        if whole.shape[:1] != (count,) or alone.shape[:1] != which.shape:
            continue  # Not of each query: a penalty that the net gives to the loss.
        size = whole.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        gaps.append(float(((whole[which] - alone).abs().max() / size).nan_to_num(0.0)))
    return max(gaps)
