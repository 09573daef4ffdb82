"""A learnt rate for every tensor and every step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from metahpo.checks import check_flag, check_number, check_whole
from metahpo.errors import NetArgumentError, NetError
from metahpo.functional.trees import Params
from metahpo.inner.rules.base import RuleState, UpdateRule
from metahpo.inner.rules.by_layer import checked_names


class LayerStepRates(UpdateRule):
    """w_l <- w_l - rates[l, step] * gradient_l (LSLR of Antoniou et al. 2019, section 4; weights and biases have their
    own).

    names: the parameter tensors, one row each; steps: the columns (a later step uses the last one); lr: the initial
    rate. Rates are free to become negative. ``rates`` is one [len(names), steps] parameter.
    """

    def __init__(self, names: Iterable[str], steps: int, lr: float, *, learnable: bool = True):
        super().__init__()
        self.names = checked_names(self, names)
        steps = check_whole(self, "steps", steps, at_least=1, error=NetArgumentError)
        lr = check_number(self, "lr", lr, error=NetArgumentError)
        learnable = check_flag(self, "learnable", learnable, error=NetArgumentError)
        self.rates = nn.Parameter(torch.full((len(self.names), steps), lr), requires_grad=learnable)
        self._row = {name: i for i, name in enumerate(self.names)}

    def forward(self, params: Params, grads: Params, state: RuleState, step: int) -> tuple[Params, RuleState]:
        unknown = [name for name in params if name not in self._row]
        if unknown:
            raise NetError(f"LayerStepRates has no rate for {unknown[0]!r}; it was made for {', '.join(self.names)}")
        rates = self.rates[:, min(step, self.rates.shape[1] - 1)].unbind()
        return {name: p - rates[self._row[name]] * grads[name] for name, p in params.items()}, state

    def by_name(self) -> dict[str, Tensor]:
        """The rates of each tensor, [steps]."""
        return dict(zip(self.names, self.rates.detach().unbind()))
