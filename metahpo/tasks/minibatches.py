"""Parts of a labelled set."""

from __future__ import annotations

import torch
from torch import Tensor


def minibatches(x: Tensor, y: Tensor, parts: int) -> list[tuple[Tensor, Tensor]]:
    """Deals a set out into parts that have, where there are labels, as many examples of each class as can be.

    Sets of a task are ordered by class, so that every k-th example would give some parts none of a class.

    Args:
        x: Inputs [N, ...].
        y: Targets [N, ...]; labels where they are whole numbers [N].
        parts: How many, at most N.

    Returns:
        Inputs and targets of each part; sizes differ by at most one.
    """
    if parts > 1 and y.dim() == 1 and not y.is_floating_point():
        order = torch.argsort(y, stable=True)
        x, y = x[order], y[order]
    return [(x[part::parts], y[part::parts]) for part in range(parts)]
