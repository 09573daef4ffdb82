"""All tasks of a batch at once, by ``torch.func.vmap``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from metahpo.errors import NetError, out_of_memory
from metahpo.functional.buffers import copied_buffers
from metahpo.functional.swap import call_with
from metahpo.functional.trees import Params, map_tree
from metahpo.functional.turns import TURN
from metahpo.learners.base import MetaLearner, Metrics
from metahpo.learners.phase import Phase
from metahpo.tasks.task import Task
from metahpo.training.engines.base import MetaGradient, mean, merged_metrics, prepare
from metahpo.training.engines.loop import Loop
from metahpo.training.engines.refusal import refusal
from metahpo.training.engines.unused import Unused


class VMap:
    """Runs the tasks of a batch as one; memory grows with their number. Dropout differs from task to task."""

    name = "vmap"

    def __init__(self) -> None:
        self.unused = Unused()

    @TURN
    def meta_gradient(self, learner: MetaLearner, tasks: Task, phase: Phase) -> MetaGradient:
        prepare(learner, tasks, phase)
        # Detached: nothing outside of vmap is to be recorded for a second gradient.
        outer = map_tree(torch.detach, learner.outer_params())
        try:
            result = _run(self.name, learner, lambda: batched_gradient(learner, outer, {}, tasks, phase))
        except NetError:
            # What no engine can do is told by the first task alone: a layer without a second derivative.
            with suppress(RuntimeError):
                Loop().meta_gradient(learner, Task(*(part[:1] for part in tasks)), phase)
            raise
        return self.unused.told(result, learner, tasks, phase)

    @TURN
    @torch.no_grad()
    def evaluate(self, learner: MetaLearner, tasks: Task, phase: Phase) -> tuple[Metrics, Params]:
        prepare(learner, tasks, phase)
        evaluate = vmap(lambda *task: learner.evaluate(Task._make(task), phase), randomness="different")
        with copied_buffers(learner):
            return _run(self.name, learner, lambda: evaluate(*tasks))


def batched_gradient(
    learner: MetaLearner, outer: Params, others: dict[str, Tensor], tasks: Task, phase: Phase
) -> MetaGradient:
    """The outer gradient with respect to ``outer``, a pure function of all the tensors given.

    others: further parameters and buffers of the learner by name, in place of its own.
    """

    # The gradient is taken inside vmap, task by task, and not by autograd through it: with torch 2.15 that is silently
    # wrong for layer, instance and batch norms whose scales differ from task to task.
    def loss_of(params: Params, *task: Tensor) -> tuple[Tensor, tuple[Tensor, Metrics]]:
        loss, metrics = call_with(learner, {**params, **others}, (Task(*task), phase))
        return loss, (loss, metrics)

    of_each = vmap(grad(loss_of, has_aux=True), in_dims=(None, *[0] * len(tasks)), randomness="different")
    grads, (losses, metrics) = of_each(outer, *tasks)
    return MetaGradient(mean(losses), map_tree(mean, grads), merged_metrics(metrics), losses.detach())


def _run(engine: str, learner: MetaLearner, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise refusal(engine, learner, error, "engine threads or loop") from error
