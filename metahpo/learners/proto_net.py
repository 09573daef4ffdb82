"""Prototypical networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metahpo.checks import check_type, check_whole
from metahpo.errors import NetArgumentError
from metahpo.functional import FunctionalModule
from metahpo.learners.base import Adapted, Metrics
from metahpo.learners.head import WithoutHead
from metahpo.learners.phase import Phase
from metahpo.tasks.task import Task


class ProtoNet(WithoutHead):
    """A query belongs to the class with the nearest mean embedding, by squared Euclidean distance (Snell et al. 2017,
    equations 1 and 2 and algorithm 1). Nothing is fitted by gradients within a task.

    net: what its head is given embeds; neither the head nor what follows it matters. ways: labels of a task are
    0..ways-1; a class without support is never predicted. head: as in ``ANIL``, of all layers with parameters but batch
    norms.
    """

    def __init__(self, net: nn.Module, ways: int, *, head: str | None = None):
        super().__init__()
        check_type(self, "net", net, nn.Module, "a module", error=NetArgumentError)
        self.ways = check_whole(self, "ways", ways, at_least=1, error=NetArgumentError)
        self._name_head(head)
        self.module = FunctionalModule(net)
        self.check_body()

    def adapt(self, support_x: Tensor, support_y: Tensor, phase: Phase) -> Adapted:
        self.look_at(support_x)
        embedded, buffers = self.features(support_x, self.module.buffers_by_name(), training=phase.training)
        members = (support_y == torch.arange(self.ways, device=support_y.device)[:, None]).to(embedded.dtype)
        sizes = members.sum(1, keepdim=True)
        means = members @ embedded / sizes.clamp(min=1)
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
        embedded, buffers = self.features(x, adapted.buffers, training=phase.training, inductive=phase.inductive)
        means, sizes = adapted.params["prototypes"], adapted.params["sizes"]
        # Expanded, |a - b|^2 = |a|^2 - 2ab + |b|^2, without the first, which is the same for all classes.
        logits = 2 * embedded @ means.mT - means.square().sum(1)
        return torch.where(sizes.mT > 0, logits, torch.finfo(logits.dtype).min / 2), buffers
