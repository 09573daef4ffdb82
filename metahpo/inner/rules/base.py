"""Update rules: differentiable optimisers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metahpo.checks import check_flag, check_number, refuse
from metahpo.errors import NetArgumentError
from metahpo.functional.trees import Params

RuleState = Any
# The hyperparameters of one tensor at one step, by name.
Hyper = Mapping[str, Tensor]
_NOT_NEGATIVE = ("lr", "momentum", "weight_decay", "lr_decay", "eps", "damping", "beta1", "beta2", "alpha", "rho")
# Weights of a running average, and what no rule can be without.
_BELOW_ONE, _AT_MOST_ONE = ("beta1", "beta2"), ("alpha", "rho")
_NEEDED = ("lr", "eps", "damping", *_BELOW_ONE, *_AT_MOST_ONE)
# In the state of a tensor: the number of steps whose loss did not use it, where there were any.
_SKIPPED = "skipped"


class UpdateRule(nn.Module):
    """A differentiable optimiser; nothing is changed in place.

    Its own ``nn.Parameter``s are hyperparameters, which an outer loop can learn. A subclass writes ``forward`` and, if
    it has momenta or counters, ``init``.

    With ``needs_loss`` the inner loop calls it as ``forward(params, grads, state, step, loss)``: ``loss(params)`` is
    this step's loss (a ``StepLoss``), closed over ``loss.batch`` and ``loss.carry``. With ``skips_unused`` the gradient
    of a tensor that the step's loss does not use is None, else zeros.
    """

    needs_loss = False
    skips_unused = False

    def init(self, params: Params) -> RuleState:
        """The state before the first step (a tree of tensors, or None)."""
        return None

    def forward(self, params: Params, grads: Params, state: RuleState, step: int) -> tuple[Params, RuleState]:
        """The parameters and the state after update number ``step`` (from 0)."""
        raise TypeError(f"{type(self).__name__} does not define forward(params, grads, state, step)")

    def add_scalars(self, learnable: bool, **values: float | None) -> None:
        """Makes each value a hyperparameter, a scalar ``nn.Parameter`` of torch's default type; None: it is absent.

        Raises:
            NetArgumentError: For what is no number or out of its bounds; for None where no optimiser does without.
        """
        learnable = check_flag(self, "learnable", learnable, error=NetArgumentError)
        for name, value in values.items():
            if value is not None or name in _NEEDED:
                # No optimiser has one of these below zero; another may be of any sign.
                low = 0 if name in _NOT_NEGATIVE else None
                high = {"below": 1 if name in _BELOW_ONE else None, "at_most": 1 if name in _AT_MOST_ONE else None}
                number = check_number(self, name, value, at_least=low, **high, error=NetArgumentError)
                self.register_parameter(name, nn.Parameter(torch.tensor(number), requires_grad=learnable))


class PerTensorRule(UpdateRule):
    """A rule that treats each tensor on its own, and differentiates by all its hyperparameters.

    A subclass makes its hyperparameters with ``add_scalars`` and writes ``update`` and, if it has a state,
    ``tensor_state``. An outer loop gives other values by ``torch.func.functional_call(rule, {"lr": lr}, (params, grads,
    state, step))``; ``ByLayer`` and ``Scheduled`` give others to each tensor or step.

    A tensor whose gradient is None stays as it is, and so does its state: neither weight decay nor momentum moves it,
    and such a step is not counted in its ``step``, as in ``torch.optim``.

    decoupled_decay: whether a hyperparameter "weight_decay" is taken off the parameters (AdamW), and not through the
    gradient as that of weight_decay / 2 |w|^2.
    """

    skips_unused = True
    decoupled_decay = False

    def tensor_state(self, param: Tensor) -> dict[str, Tensor]:
        """What the rule carries for one tensor, before the first step."""
        return {}

    def update(
        self, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int, hyper: Hyper
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The tensor and its state after update number ``step``, with ``hyper`` in place of the rule's own scalars."""
        raise TypeError(f"{type(self).__name__} does not define update(param, grad, state, step, hyper)")

    def hyper(self, names: Iterable[str], step: int) -> Mapping[str, Hyper]:
        """The hyperparameters of each tensor at ``step``: here the rule's own scalars for all of them."""
        return dict.fromkeys(names, self._parameters)  # type: ignore[arg-type]

    def init(self, params: Params) -> RuleState:
        states = {name: self.tensor_state(p) for name, p in params.items()}
        return states if any(states.values()) else None

    def forward(self, params: Params, grads: Params, state: RuleState, step: int) -> tuple[Params, RuleState]:
        hyper = self.hyper(params, step)
        new, states = {}, {}
        for name, p in params.items():
            old = {} if state is None else state[name]
            grad = grads[name]
            if grad is None:
                new[name], states[name] = p, {**old, _SKIPPED: old.get(_SKIPPED, 0) + 1}
            elif _SKIPPED in old:
                new[name], states[name] = self._after_skips(p, grad, old, step, hyper[name])
            else:
                new[name], states[name] = self.update(p, grad, old, step, hyper[name])
        return new, None if state is None else states

    def _after_skips(
        self, param: Tensor, grad: Tensor, state: Mapping[str, Any], step: int, hyper: Hyper
    ) -> tuple[Tensor, dict[str, Any]]:
        own = dict(state)
        skipped = own.pop(_SKIPPED)
        param, own = self.update(param, grad, own, step - skipped, hyper)
        return param, {**own, _SKIPPED: skipped}


def checked_params(rule: UpdateRule, params: Params) -> Params:
    """The tensors by name that a rule is made for; raises NetArgumentError for anything else, and for none."""
    named = isinstance(params, Mapping) and params and all(isinstance(p, Tensor) for p in params.values())
    if not named:
        refuse(rule, "params", params, "the tensors to update by name, at least one", NetArgumentError)
    return params


def decayed(param: Tensor, grad: Tensor, hyper: Hyper) -> Tensor:
    """The gradient with that of ``weight_decay / 2 * param^2`` added, where there is a weight decay."""
    decay = hyper.get("weight_decay")
    return grad if decay is None else grad + decay * param


def root(x: Tensor) -> Tensor:
    """The square root; 0 where x <= 0, and so is its derivative there.

    An average of squares is 0 where all gradients so far were: there the root's own derivative would be infinite and
    the product with that of the average NaN, while a central difference gives 0.
    """
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)
