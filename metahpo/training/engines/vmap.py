"""All tasks of a batch at once, by ``torch.func.vmap``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from metahpo.errors import NetError, one_line
from metahpo.functional.trees import Params, map_tree
from metahpo.learners.base import MetaLearner, Metrics
from metahpo.learners.phase import Phase
from metahpo.tasks.task import Task
from metahpo.training.engines.base import MetaGradient


class VMap:
    """Runs the tasks of a batch as one; memory grows with their number. Dropout differs from task to task."""

    name = "vmap"

    def meta_gradient(self, learner: MetaLearner, tasks: Task, phase: Phase) -> MetaGradient:
        learner.train(phase.training)

        # The gradient is taken inside vmap, task by task, and not by autograd through it: with torch 2.15 that is
        # silently wrong for layer, instance and batch norms whose scales differ from task to task.
        def loss_of(params: Params, *task: Tensor) -> tuple[Tensor, tuple[Tensor, Metrics]]:
            loss, metrics = functional_call(learner, params, (Task(*task), phase))
            return loss, (loss, metrics)

        in_dims = (None, *[0] * len(tasks))
        grads, (losses, metrics) = _vmapped(
            grad(loss_of, has_aux=True), learner, in_dims, learner.outer_params(), *tasks
        )
        buffers = map_tree(_mean, metrics.pop("buffers", {}))
        metrics = {**map_tree(_mean, metrics), "buffers": buffers}
        return MetaGradient(_mean(losses), map_tree(_mean, grads), metrics, losses.detach())

    @torch.no_grad()
    def evaluate(self, learner: MetaLearner, tasks: Task, phase: Phase) -> tuple[Metrics, Params]:
        learner.train(phase.training)
        return _vmapped(lambda *task: learner.evaluate(Task(*task), phase), learner, 0, *tasks)


def _mean(tensor: Tensor) -> Tensor:
    return tensor.detach().mean(0)


def _vmapped(function, learner: MetaLearner, in_dims, *arguments):
    try:
        return vmap(function, in_dims=in_dims, randomness="different")(*arguments)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        name = type(learner).__name__
        raise NetError(f"engine vmap cannot run this {name} ({one_line(error)}); choose engine loop") from error
