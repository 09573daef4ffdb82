"""A learnt rate for every weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metahpo.checks import check_flag, check_number, check_whole
from metahpo.errors import NetArgumentError, NetError
from metahpo.functional.trees import Params
from metahpo.inner.rules.base import RuleState, UpdateRule, checked_params


class WeightRates(UpdateRule):
    """w <- w - rates * gradient, elementwise, with rates of w's shape: a direction and a rate in one (Meta-SGD, Li et
    al. 2017, equation 2).

    params: the tensors to update; lr: the initial rate of all weights; steps: None for one set of rates, or how many
    steps have rates of their own (a later step uses the last ones). Rates are free to become negative. ``rates`` holds
    one parameter [steps or 1, *shape] for each tensor.
    """

    def __init__(self, params: Params, lr: float, *, steps: int | None = None, learnable: bool = True):
        super().__init__()
        self.names = tuple(checked_params(self, params))
        lr = check_number(self, "lr", lr, error=NetArgumentError)
        steps = 1 if steps is None else check_whole(self, "steps", steps, at_least=1, error=NetArgumentError)
        learnable = check_flag(self, "learnable", learnable, error=NetArgumentError)
        self.rates = nn.ParameterList(
            nn.Parameter(torch.full((steps, *p.shape), lr, dtype=p.dtype, device=p.device), learnable)
            for p in params.values()
        )

    def forward(self, params: Params, grads: Params, state: RuleState, step: int) -> tuple[Params, RuleState]:
        unknown = [name for name in params if name not in self.names]
        if unknown:
            raise NetError(f"WeightRates has no rates for {unknown[0]!r}; it was made for {', '.join(self.names)}")
        rates = {name: rows[min(step, rows.shape[0] - 1)] for name, rows in zip(self.names, self.rates)}
        return {name: p - rates[name] * grads[name] for name, p in params.items()}, state

    def by_name(self) -> dict[str, Tensor]:
        """The mean rate of each tensor, [steps or 1]."""
        return {name: rows.detach().flatten(1).mean(1) for name, rows in zip(self.names, self.rates)}
