"""All tasks of a batch at once, by ``torch.func.vmap``."""

from __future__ import annotations

import torch
from torch.func import vmap

from metahpo.errors import NetError
from metahpo.functional.trees import Params, map_tree
from metahpo.learners.base import MetaLearner, Metrics
from metahpo.learners.phase import Phase
from metahpo.tasks.task import Task
from metahpo.training.engines.base import MetaGradient


class VMap:
    """Runs the tasks of a batch as one; memory grows with their number. Dropout differs from task to task."""

    name = "vmap"

    def meta_gradient(self, learner: MetaLearner, tasks: Task, phase: Phase) -> MetaGradient:
        params = learner.outer_params()
        losses, metrics = _vmapped(lambda *task: learner.meta_loss(Task(*task), phase), learner, tasks)
        loss = losses.mean()
        grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
        mean = lambda tensor: tensor.detach().mean(0)  # noqa: E731
        buffers = map_tree(mean, metrics.pop("buffers", {}))
        means = {**map_tree(mean, metrics), "buffers": buffers}
        return MetaGradient(loss.detach(), dict(zip(params, grads)), means, losses.detach())

    @torch.no_grad()
    def evaluate(self, learner: MetaLearner, tasks: Task, phase: Phase) -> tuple[Metrics, Params]:
        return _vmapped(lambda *task: learner.evaluate(Task(*task), phase), learner, tasks)


def _vmapped(function, learner: MetaLearner, tasks: Task):
    try:
        return vmap(function, randomness="different")(*tasks)
    except RuntimeError as error:
        if "vmap" not in str(error) and "batch" not in str(error).lower():
            raise
        reason = " ".join(str(error).split())[:300]
        raise NetError(
            f"engine vmap cannot run this {type(learner).__name__} ({reason}); choose engine loop"
        ) from error
