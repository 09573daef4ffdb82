"""Prototypical networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metahpo.checks import check_type, check_whole
from metahpo.errors import NetArgumentError
from metahpo.functional import FunctionalModule
from metahpo.functional.surgery import without_head
from metahpo.learners.base import Adapted, MetaLearner, Metrics
from metahpo.learners.phase import Phase
from metahpo.tasks.task import Task


class ProtoNet(MetaLearner):
    """A query belongs to the class with the nearest mean embedding, by squared Euclidean distance (Snell et al. 2017,
    equations 1 and 2 and algorithm 1). Nothing is fitted by gradients within a task.

    net: its head is left out, what comes before it embeds. ways: labels of a task are 0..ways-1; a class without
    support is never predicted.
    """

    def __init__(self, net: nn.Module, ways: int):
        super().__init__()
        check_type(self, "net", net, nn.Module, "a module", error=NetArgumentError)
        self.ways = check_whole(self, "ways", ways, at_least=1, error=NetArgumentError)
        self.module = FunctionalModule(without_head(net)[0])

    def adapt(self, support_x: Tensor, support_y: Tensor, phase: Phase) -> Adapted:
        buffers = self.module.buffers_by_name()
        embedded, buffers = self.module.apply_with({}, buffers, support_x, training=phase.training)
        members = (support_y == torch.arange(self.ways, device=support_y.device)[:, None]).to(embedded.dtype)
        sizes = members.sum(1, keepdim=True)
        means = members @ embedded.flatten(1) / sizes.clamp(min=1)
        return Adapted({"prototypes": means, "sizes": sizes}, phase, buffers)

    def predict(self, adapted: Adapted, x: Tensor) -> Tensor:
        return self._predict(adapted, x)[0]

    def meta_loss(self, task: Task, phase: Phase) -> tuple[Tensor, Metrics]:
        adapted = self.adapt(task.support_x, task.support_y, phase)
        outputs, buffers = self._predict(adapted, task.query_x)
        metrics = {**self.measure(outputs, task.query_y), "buffers": self.changed(buffers)}
        return self.loss(outputs, task.query_y), metrics

    def _predict(self, adapted: Adapted, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        phase = adapted.phase
        embedded, buffers = self.module.apply_with(
            {}, adapted.buffers, x, training=phase.training, inductive=phase.inductive
        )
        means, sizes = adapted.params["prototypes"], adapted.params["sizes"]
        # Expanded, |a - b|^2 = |a|^2 - 2ab + |b|^2, without the first, which is the same for all classes.
        logits = 2 * embedded.flatten(1) @ means.mT - means.square().sum(1)
        return torch.where(sizes.mT > 0, logits, torch.finfo(logits.dtype).min / 2), buffers
