"""The reference engine: one task after the other."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from metahpo.functional.buffers import copied_buffers
from metahpo.functional.second_order import check_graph, second_derivatives
from metahpo.functional.trees import Params, stack_trees
from metahpo.functional.turns import TURN
from metahpo.learners.base import MetaLearner, Metrics
from metahpo.learners.phase import Phase
from metahpo.tasks.task import Task
from metahpo.training.engines.base import MetaGradient, gradients, mean_metrics, prepare, stack_metrics


class Loop:
    """Runs the tasks of a batch in turn; memory is that of one task."""

    name = "loop"

    def __init__(self) -> None:
        self._checked: Callable[[], MetaLearner | None] = lambda: None

    @TURN
    def meta_gradient(self, learner: MetaLearner, tasks: Task, phase: Phase) -> MetaGradient:
        prepare(learner, tasks, phase)
        params = learner.outer_params()
        count = tasks.query_x.shape[0]
        total: list[Tensor] | tuple[Tensor, ...] | None = None
        losses, rows, used = [], [], set[str]()
        for index in range(count):
            with second_derivatives(lambda: learner.meta_loss(tasks.select(0), phase)):
                loss, metrics = learner.meta_loss(tasks.select(index), phase)
                if self._checked() is not learner:
                    check_graph(loss, lambda: learner.meta_loss(tasks.select(0), phase))
                    self._checked = weakref.ref(learner)
                grads, here = gradients(loss / count, params)
            used |= here
            total = grads if total is None else torch._foreach_add(total, grads)
            losses.append(loss.detach())
            rows.append(metrics)
        stacked = torch.stack(losses)
        unused = tuple(name for name in params if name not in used)
        return MetaGradient(stacked.mean(), dict(zip(params, total or ())), mean_metrics(rows), stacked, unused)

    @TURN
    @torch.no_grad()
    def evaluate(self, learner: MetaLearner, tasks: Task, phase: Phase) -> tuple[Metrics, Params]:
        prepare(learner, tasks, phase)
        results = []
        for index in range(tasks.query_x.shape[0]):
            with copied_buffers(learner):
                results.append(learner.evaluate(tasks.select(index), phase))
        return stack_metrics([metrics for metrics, _ in results]), stack_trees([outputs for _, outputs in results])
