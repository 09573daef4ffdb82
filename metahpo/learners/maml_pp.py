"""MAML++."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from metahpo.inner import InnerGradient, NoRemat, Remat, Reverse
from metahpo.learners.base import Loss
from metahpo.learners.maml import INNER_LR, MAML
from metahpo.learners.phase import Improvements


class MAMLPlusPlus(MAML):
    """MAML with the improvements of "How to Train Your MAML" (Antoniou et al. 2019), each a switch of its own.

    net, steps, inner_lr, loss, gradient, remat: as in ``MAML``; the switches: see ``Improvements``. Derivative-order
    annealing is off by default, as in the authors' configurations; the paper's setting is ``first_order_epochs=50``.
    With every switch off this is ``MAML``. The sixth, the outer rate's cosine annealing, is a setting of the training
    (``TrainingSettings.min_lr``).
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        steps: int = 5,
        inner_lr: float = INNER_LR,
        loss: Loss = F.cross_entropy,
        multi_step_epochs: int = 10,
        first_order_epochs: int = 0,
        per_step_statistics: bool = True,
        per_step_affine: bool = True,
        layer_step_rates: bool = True,
        gradient: InnerGradient = Reverse(),
        remat: Remat = NoRemat(),
    ):
        switches = Improvements(
            multi_step_epochs, first_order_epochs, per_step_statistics, per_step_affine, layer_step_rates
        )
        super().__init__(
            net, steps=steps, inner_lr=inner_lr, loss=loss, improvements=switches, gradient=gradient, remat=remat
        )
