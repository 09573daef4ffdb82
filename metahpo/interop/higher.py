"""Optimisers that higher differentiates, as update rules."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from metahpo.errors import NetError, one_line
from metahpo.functional.trees import Params
from metahpo.inner import UpdateRule
from metahpo.inner.rules.base import RuleState
from metahpo.interop.packages import load

# Settings of today's torch.optim that higher, of 2020, passes over in silence.
_UNKNOWN_TO_HIGHER = ("maximize", "decoupled_weight_decay")


class HigherRule(UpdateRule):
    """An optimiser of ``torch.optim``, or one added by ``higher.register_optim``, differentiated by higher
    (Grefenstette et al. 2019, section 3).

    optimizer: its class; settings: its arguments, such as ``lr``. learn_lr: whether the outer loop learns the rate
    ``lr``. The state holds what higher keeps for each tensor, by its name. The update is higher's: its Adam adds eps
    to the square root before that is corrected for its start at zero, torch's of today after.

    Raises NetError if higher is not installed, cannot differentiate the optimiser or one of its settings, or does not
    differentiate by its rate (ASGD and Rprop).
    """

    def __init__(self, optimizer: type[torch.optim.Optimizer], *, learn_lr: bool = False, **settings: Any):
        super().__init__()
        higher = load("higher", 'pip install "metahpo[interop]"')
        name = optimizer.__name__
        try:
            self._optimizer = higher.create_diff_optim(optimizer, settings, params=[torch.zeros(1)])
        except (TypeError, ValueError) as error:
            raise NetError(f"HigherRule({name}): {one_line(error)}") from error
        (self._group,) = self._optimizer.param_groups
        for setting in _UNKNOWN_TO_HIGHER:
            if self._group.get(setting):
                raise NetError(f"HigherRule({name}): higher does not know {setting}, found {self._group[setting]}")
        # Both turn it into a number on the way.
        if optimizer not in (torch.optim.ASGD, torch.optim.Rprop):
            self.add_scalars(learn_lr, lr=self._group["lr"])
        elif learn_lr:
            raise NetError(f"HigherRule({name}): higher does not differentiate by the rate of {name}")

    def init(self, params: Params) -> RuleState:
        # What an optimiser holds before its first step (the sum of Adagrad) is one number for all weights.
        start = self._optimizer.state[0].get(0, {})
        return {name: {key: _like(p, value) for key, value in start.items()} for name, p in params.items()}

    def forward(self, params: Params, grads: Params, state: RuleState, step: int) -> tuple[Params, RuleState]:
        optimizer = copy.copy(self._optimizer)  # It keeps parameters and state on itself; this one is thrown away.
        group = {**self._group, **self._parameters, "params": list(params.values())}
        states: dict[int, dict] = defaultdict(dict, {i: dict(state[name]) for i, name in enumerate(params)})
        optimizer.param_groups, optimizer.state = [group], [states]
        optimizer._update([[grads[name] for name in params]])
        return dict(zip(params, group["params"])), {name: states[i] for i, name in enumerate(params)}


def _like(param: Tensor, value: Any) -> Any:
    """A first state of one weight as that of ``param``; a count of steps as a number, as higher adds to it in place."""
    if not isinstance(value, Tensor):
        return value
    return torch.full_like(param, value.item()) if value.dim() else value.item()
