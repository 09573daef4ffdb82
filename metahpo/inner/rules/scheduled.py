"""A step schedule of the rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from metahpo.checks import check_flag, check_number, check_type, check_whole, refuse
from metahpo.errors import NetArgumentError
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
        expected = "a rule that treats each tensor on its own, such as SGD(lr)"
        self.rule = check_type(self, "rule", rule, PerTensorRule, expected, error=NetArgumentError)
        self.decoupled_decay = rule.decoupled_decay
        if not isinstance(factors, Iterable) or isinstance(factors, str) or len(factors) == 0:
            refuse(self, "factors", factors, "a list of at least one number", NetArgumentError)
        numbers = [check_number(self, f"factors[{i}]", f, error=NetArgumentError) for i, f in enumerate(factors)]
        self.every = check_whole(self, "every", every, at_least=1, error=NetArgumentError)
        learnable = check_flag(self, "learnable", learnable, error=NetArgumentError)
        self.factors = nn.Parameter(torch.tensor(numbers), requires_grad=learnable)

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
