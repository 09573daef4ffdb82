"""Update rules: differentiable optimisers."""

from __future__ import annotations

from typing import Any

from torch import nn

from metahpo.functional.trees import Params

RuleState = Any


class UpdateRule(nn.Module):
    """A differentiable optimiser; nothing is changed in place.

    Its own ``nn.Parameter``s are hyperparameters, which an outer loop can learn. A subclass writes ``forward`` and, if
    it has momenta or counters, ``init``.
    """

    def init(self, params: Params) -> RuleState:
        """The state before the first step (a tree of tensors, or None)."""
        return None

    def forward(self, params: Params, grads: Params, state: RuleState, step: int) -> tuple[Params, RuleState]:
        """The parameters and the state after update number ``step`` (from 0)."""
        raise TypeError(f"{type(self).__name__} does not define forward(params, grads, state, step)")
