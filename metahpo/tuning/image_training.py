"""Gradient descent on few images with a rate each step: the inner training of dataset distillation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from metahpo.errors import MetaHPOError, NetError, one_line
from metahpo.functional.module import FunctionalModule
from metahpo.functional.trees import Params, map_tree, stack_trees
from metahpo.inner.problem import RULE, InnerProblem
from metahpo.inner.rules.base import RuleState, UpdateRule

IMAGES, LOG_RATES = "images", RULE + "log_rates"


class StepRates(UpdateRule):
    """w <- w - exp(log_rates[step]) * gradient: a positive rate for each step; log_rates: one [steps] parameter."""

    def __init__(self, steps: int):
        super().__init__()
        self.log_rates = nn.Parameter(torch.zeros(steps))

    def forward(self, params: Params, grads: Params, state: RuleState, step: int) -> tuple[Params, RuleState]:
        rate = self.log_rates[step].exp()
        return {name: p - rate * grads[name] for name, p in params.items()}, state


class ImageTraining:
    """A net trained by cross-entropy on images [n, ...] with fixed labels, from R initialisations at once.

    net: copied; it runs in evaluation mode throughout, so that batch normalisation keeps its running statistics (a
    layer without any takes the batch's) and dropout is off. labels: [n]; batches: for each step the positions of its
    images. Parameters have a leading dimension R. The hyperparameters are "images" and "rule.log_rates" [steps].
    """

    def __init__(self, net: nn.Module, labels: Tensor, batches: Sequence[Tensor]):
        self.labels, self.batches = labels, list(batches)
        self.net = FunctionalModule(net)
        if not self.net.params():
            raise NetError(f"net: {type(net).__name__} has no trainable parameters")
        self.net.freeze_statistics()
        self.rule = StepRates(len(self.batches))
        self.problem = InnerProblem(self.loss)
        # Constants, or an outer gradient would look for them.
        self.buffers = map_tree(torch.detach, self.net.buffers_by_name())

    def start(self, nets: Sequence[nn.Module]) -> Params:
        """The trainable parameters of nets like the one given, stacked [R, ...]."""
        shapes = {name: p.shape for name, p in self.net.params().items()}
        own = [dict(net.named_parameters()) for net in nets]
        return stack_trees([{name: each[name].detach().view(shape) for name, shape in shapes.items()} for each in own])

    def logits(self, params: Params, x: Tensor) -> Tensor:
        """[R, N, classes] for images [N, ...]."""
        if len(next(iter(params.values()))) == 1:
            return self._call({name: p[0] for name, p in params.items()}, x).unsqueeze(0)
        return vmap(self._call, (0, None))(params, x)

    def losses(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """The cross-entropy of each of the R nets."""
        logits = self.logits(params, x)
        flat = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)), reduction="none")
        return flat.view(len(logits), -1).mean(1)

    def loss(self, params: Params, hparams: Params, which: Tensor) -> Tensor:
        """The inner loss of all R nets: their sum, so that each has its own gradient."""
        return self.losses(params, hparams[IMAGES][which], self.labels[which]).sum()

    def fit(self, start: Params, hparams: Params) -> Params:
        """The parameters after all steps."""
        with torch.no_grad():
            return self.problem.fit(self.rule, start, hparams, self.batches).params

    def check(self, x: Tensor, classes: int) -> None:
        """Raises NetError where the net does not give logits [N, classes or more] for images like ``x``."""
        try:
            with torch.no_grad():
                found = self._call(self.net.params(), x)
        except MetaHPOError:
            raise
        except Exception as error:
            raise NetError(f"net: cannot take images {list(x.shape)}: {one_line(error)}") from None
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(x) or found.shape[1] < classes:
            raise NetError(f"net: gave {shape} for images {list(x.shape)}, expected logits [{len(x)}, {classes}]")

    def _call(self, params: Params, x: Tensor) -> Tensor:
        return self.net.apply_with(params, self.buffers, x, training=False)[0]
