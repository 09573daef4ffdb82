"""Algorithms of learn2learn as meta-learners."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metahpo.errors import NetError, one_line, out_of_memory
from metahpo.functional import FunctionalModule
from metahpo.functional.copies import copied
from metahpo.functional.levels import under_torch_func
from metahpo.functional.trees import map_tree
from metahpo.interop.packages import load
from metahpo.learners.base import Adapted, Loss, MetaLearner
from metahpo.learners.phase import Phase


class Learn2LearnLearner(MetaLearner):
    """One of learn2learn's gradient-based algorithms (``MAML``, ``MetaSGD``, ``GBML``) as a ``MetaLearner``: its inner
    step in this package's training, with its engines ``loop`` and ``threads``.

    algorithm: an object that wraps a net and has ``clone`` and ``adapt``; it is copied. steps: inner updates, in
    training and evaluation; loss: inner and outer loss. Batch norm uses batch statistics in training and evaluation, as
    learn2learn's examples do; its scales and shifts are adapted with the rest, which ``MAML`` here does not by default.

    Raises NetError if learn2learn is not installed or ``algorithm`` is none of these; and, in training, for engines
    built on ``torch.func``.
    """

    def __init__(self, algorithm: Any, *, steps: int = 5, loss: Loss = F.cross_entropy):
        super().__init__(loss)
        self._clone_module = load("learn2learn.utils", "scripts/install_learn2learn PYTHON").clone_module
        net = getattr(algorithm, "module", None)
        if not isinstance(net, nn.Module) or not hasattr(algorithm, "clone") or not hasattr(algorithm, "adapt"):
            raise NetError(f"expected MAML, MetaSGD or GBML of learn2learn, found {type(algorithm).__name__}")
        if steps < 1:
            raise NetError(f"steps must be at least 1, found {steps}")
        self.steps = steps
        self.module = FunctionalModule(net)
        self.algorithm = copied(algorithm)
        self.algorithm.module = nn.Identity()  # The net is held once.

    def adapt(self, support_x: Tensor, support_y: Tensor, phase: Phase) -> Adapted:
        name = f"learn2learn's {type(self.algorithm).__name__}"
        if under_torch_func():
            raise NetError(f"{name} differentiates by autograd, not by torch.func; choose engine threads or loop")
        tracked = torch.is_grad_enabled()
        options = {"first_order": True} if phase.first_order or not tracked else {}
        with torch.enable_grad():
            clone = self.algorithm.clone()
            # The clone holds the weights and updates them; the net is run as everywhere, so that it does not change.
            clone.module = self._clone_module(self.module.net)
            buffers = self.module.buffers_by_name()
            for _ in range(self.steps):
                params = dict(clone.module.named_parameters())
                outputs, buffers = self.module.apply_with(params, buffers, support_x, training=phase.training)
                try:
                    clone.adapt(self.loss(outputs, support_y), **options)
                # MAML prints why there is no gradient, and goes on without.
                except (RuntimeError, UnboundLocalError) as error:
                    if out_of_memory(error):
                        raise
                    raise NetError(
                        f"{name} cannot adapt the net ({one_line(error)}); it may need allow_unused, allow_nograd or "
                        "engine loop"
                    ) from error
        params = dict(clone.module.named_parameters())
        if not tracked:
            params, buffers = (map_tree(torch.detach, tree) for tree in (params, buffers))
        return Adapted(params, phase, buffers)

    def predict(self, adapted: Adapted, x: Tensor) -> Tensor:
        modes = {"training": adapted.phase.training, "inductive": adapted.phase.inductive}
        return self.module.apply_with(adapted.params, adapted.buffers, x, **modes)[0]
