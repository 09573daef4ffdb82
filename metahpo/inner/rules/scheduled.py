"""A step schedule of the rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from metahpo.checks import check_flag, check_whole
from metahpo.errors import NetArgumentError, NetError
from metahpo.inner.rules.base import Hyper, PerTensorRule


class Scheduled(PerTensorRule):
    """``rule`` with its ``lr`` at step t multiplied by ``factors[t // every]``, after the last phase by the last factor
    (``torch.optim.lr_scheduler.StepLR`` with factors 1, gamma, gamma^2, ...).

    factors: one for each phase, a hyperparameter [phases]; every: the steps of a phase. learnable: whether the outer
    loop learns the factors. The rule is a submodule: its own hyperparameters are named ``rule.lr`` and so on.

    Raises NetError for a rule without ``lr``, no factors, or a phase of less than one step.
    """

    def __init__(self, rule: PerTensorRule, factors: Sequence[float], every: int = 1, *, learnable: bool = True):
        super().__init__()
        if not isinstance(rule, PerTensorRule):
            raise NetError(f"Scheduled: rule should treat each tensor on its own, found {type(rule).__name__}")
        if len(factors) == 0 or every < 1:
            raise NetError(
                f"Scheduled: expected factors and every at least 1, found {len(factors)} factors, every {every}"
            )
        self.rule = rule
        self.every = check_whole(self, "every", every, error=NetArgumentError)
        learnable = check_flag(self, "learnable", learnable, error=NetArgumentError)
        self.factors = nn.Parameter(torch.tensor([float(f) for f in factors]), requires_grad=learnable)

    def tensor_state(self, param: Tensor) -> dict[str, Tensor]:
        return self.rule.tensor_state(param)

    def update(
        self, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int, hyper: Hyper
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.rule.update(param, grad, state, step, hyper)

    def hyper(self, names: Iterable[str], step: int) -> Mapping[str, Hyper]:
        factor = self.factors[min(step // self.every, len(self.factors) - 1)]
        # Tensors that share their hyperparameters go on sharing them.
        scaled: dict[int, Hyper] = {}
        by_name = {}
        for name, hyper in self.rule.hyper(names, step).items():
            if id(hyper) not in scaled:
                scaled[id(hyper)] = {**hyper, "lr": hyper["lr"] * factor}
            by_name[name] = scaled[id(hyper)]
        return by_name
