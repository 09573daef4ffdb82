"""A linear head fitted on pre-trained features: the baseline without meta-learning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metahpo.checks import check_number, check_type, check_whole
from metahpo.errors import NetArgumentError, NetError
from metahpo.functional import FunctionalModule, Params
from metahpo.functional.surgery import like
from metahpo.learners.base import Adapted, Metrics
from metahpo.learners.head import WithoutHead
from metahpo.learners.phase import Phase
from metahpo.tasks.task import Task


class LinearHead(WithoutHead):
    """Trains the net as an ordinary classifier of all training classes; on a new task a linear head alone is fitted to
    the support set's features (the Baseline of Chen et al. 2019, section 3.1).

    net: its head, a linear layer, is replaced by one of ``classes`` outputs, and nothing follows that. ways: labels of
    an evaluation task are 0..ways-1. Training tasks must be labelled by class, 0..classes-1 (``Episodes(...,
    labels="class")``), and their support and query sets are one batch to it. steps, inner_lr: of the head's gradient
    descent from zero on cross entropy; the rate is ``inner_lr`` divided by the mean square of the features' length, so
    that it fits any features. head: as in ``ProtoNet``.
    """

    def __init__(
        self,
        net: nn.Module,
        ways: int,
        classes: int,
        *,
        steps: int = 100,
        inner_lr: float = 1.0,
        head: str | None = None,
    ):
        super().__init__()
        check_type(self, "net", net, nn.Module, "a module", error=NetArgumentError)
        ways = check_whole(self, "ways", ways, at_least=1, error=NetArgumentError)
        classes = check_whole(self, "classes", classes, at_least=1, error=NetArgumentError)
        steps = check_whole(self, "steps", steps, at_least=1, error=NetArgumentError)
        inner_lr = check_number(self, "inner_lr", inner_lr, at_least=0, error=NetArgumentError)
        self._name_head(head)
        self.module = FunctionalModule(net)
        self.check_body()
        layer = self.head_layer()
        if head is None and not isinstance(net, nn.Sequential):  # What such a net registers last need not run last.
            linear = [layer for layer in self._layers().values() if isinstance(layer, nn.Linear)]
            layer = linear[-1] if linear else layer
        if not isinstance(layer, nn.Linear):
            raise NetError(
                f"linear_head needs a net that ends in a Linear layer, found {type(layer).__name__}; or name it by head"
            )
        self.classifier = like(nn.Linear(layer.in_features, classes), layer)
        self.ways, self.steps, self.inner_lr = ways, steps, inner_lr

    def meta_loss(self, task: Task, phase: Phase) -> tuple[Tensor, Metrics]:
        x, y = torch.cat([task.support_x, task.query_x]), torch.cat([task.support_y, task.query_y])
        features, buffers = self._features(x, self.module.buffers_by_name(), phase)
        outputs = self.classifier(features)
        return self.loss(outputs, y), {**self.measure(outputs, y), "buffers": self.changed(buffers)}

    def adapt(self, support_x: Tensor, support_y: Tensor, phase: Phase) -> Adapted:
        features, buffers = self._features(support_x, self.module.buffers_by_name(), phase)
        features = F.pad(features.detach(), (0, 1), value=1.0)  # The last column is the bias's.
        classes = torch.arange(self.ways, device=support_y.device)
        targets = (support_y[:, None] == classes).to(features.dtype)
        rate = self.inner_lr / features.square().sum(1).mean()
        head = features.new_zeros(self.ways, features.shape[1])
        for _ in range(self.steps):
            wrong = (features @ head.mT).softmax(-1) - targets
            head = head - rate * (wrong.mT @ features) / len(features)
        return Adapted({"head": head}, phase, buffers)

    def predict(self, adapted: Adapted, x: Tensor) -> Tensor:
        features, _ = self._features(x, adapted.buffers, adapted.phase)
        return F.pad(features, (0, 1), value=1.0) @ adapted.params["head"].mT

    def look_at(self, x: Tensor) -> None:
        if self._looked:
            return
        super().look_at(x)
        layer, width = self.head_layer(), self.classifier.in_features
        if isinstance(layer, nn.Linear) and layer.in_features == width:
            return
        name, self.head, self._looked = self.head, None, False
        raise NetArgumentError(
            f"LinearHead: head: {name!r} is the last layer that the net calls, but a Linear layer of {width} inputs "
            f"was expected, the last that it registers; give head={name!r}, which should be a Linear layer"
        )

    def _features(self, x: Tensor, buffers: Params, phase: Phase) -> tuple[Tensor, Params]:
        self.look_at(x)
        features, buffers = self.features(x, buffers, training=phase.training, inductive=phase.inductive)
        if features.shape[1] != self.classifier.in_features:
            raise NetError(
                f"LinearHead: the head {self.head!r} is given {features.shape[1]} values an example, expected "
                f"{self.classifier.in_features}; name another layer by head"
            )
        return features, buffers
