"""What changes with the epoch, and the schedules that change it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metahpo.checks import check_flag, check_whole
from metahpo.errors import NetArgumentError


@dataclass(frozen=True)
class Phase:
    """How a learner is to run now.

    training: dropout on, running statistics updated; first_order: inner gradients are constants to the outer one;
    step_weights: [steps], the weight of the query loss after each inner step, or None for the last step alone;
    inductive: batch norm predicts from running statistics, one query independent of the others.
    """

    training: bool = False
    first_order: bool = False
    step_weights: Tensor | None = None
    inductive: bool = False


@dataclass(frozen=True)
class Improvements:
    """The switches of "How to Train Your MAML" (Antoniou et al. 2019) that a gradient-based learner takes; all off is
    MAML.

    The sixth, cosine annealing of the outer rate, is the trainer's.

    multi_step_epochs: epochs over which the multi-step loss (MSL) anneals to the last step alone; 0 is off.
    first_order_epochs: epochs of first-order gradients before second-order ones (DA); 0 is off. The authors' program
    runs one epoch more than the number it is given. per_step_statistics, per_step_affine: batch-norm running statistics
    (BNRS) and scales and shifts (BNWB) by inner step. layer_step_rates: a learnt rate for every tensor and step (LSLR).
    """

    multi_step_epochs: int = 0
    first_order_epochs: int = 0
    per_step_statistics: bool = False
    per_step_affine: bool = False
    layer_step_rates: bool = False

    def __post_init__(self) -> None:
        for name in ("multi_step_epochs", "first_order_epochs"):
            epochs = check_whole(self, name, getattr(self, name), at_least=0, error=NetArgumentError)
            object.__setattr__(self, name, epochs)
        for name in ("per_step_statistics", "per_step_affine", "layer_step_rates"):
            flag = check_flag(self, name, getattr(self, name), error=NetArgumentError)
            object.__setattr__(self, name, flag)

    def training_phase(self, epoch: int, steps: int) -> Phase:
        """The phase of training epoch ``epoch`` (from 0) with ``steps`` inner steps."""
        weights = multi_step_weights(epoch, steps, self.multi_step_epochs) if epoch < self.multi_step_epochs else None
        return Phase(training=True, first_order=epoch < self.first_order_epochs, step_weights=weights)


def multi_step_weights(epoch: int, steps: int, annealing_epochs: int) -> Tensor:
    """The weights [steps] of the query losses in the multi-step loss at ``epoch``, float64 (Antoniou et al. 2019,
    equation 2).

    All start at 1/steps; over ``annealing_epochs`` those before the last decay linearly, to no less than 0.03/steps,
    and the last takes what they lose. (The paper gives no rates; these are of the authors' program.)
    """
    decay = epoch / (steps * annealing_epochs)
    others = max(1 / steps - decay, 0.03 / steps)
    last = min(1 / steps + decay * (steps - 1), 1 - (steps - 1) * 0.03 / steps)
    return torch.tensor([others] * (steps - 1) + [last], dtype=torch.float64)
