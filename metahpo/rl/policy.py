"""A Gaussian policy."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class GaussianPolicy(nn.Module):
    """Actions normal about a net's output, with a learnt deviation for each component that no observation changes.

    mean: observations [N, O] to means [N, A]. initial_std: of every component of an action, in units of the half range
    that environments take, 1.
    """

    def __init__(self, mean: nn.Module, actions: int, initial_std: float = 1.0):
        super().__init__()
        self.mean = mean
        self.log_std = nn.Parameter(torch.full((actions,), math.log(initial_std)))

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Means [N, A] and logarithms of deviations [A]."""
        return self.mean(observations), self.log_std


def log_prob(actions: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """The log density [...] of ``actions`` [..., A] under N(mean [..., A], exp(log_std [A])^2)."""
    z = (actions - mean) * torch.exp(-log_std)
    return -(0.5 * z.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)
