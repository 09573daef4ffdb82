"""One training as a function of its hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from metahpo.errors import HypergradientError, did_you_mean
from metahpo.functional.formulas import by_formula
from metahpo.functional.lending import Lent
from metahpo.functional.swap import call_with
from metahpo.functional.trees import Params
from metahpo.inner.gradient import InnerGradient, Reverse
from metahpo.inner.remat import NoRemat, Remat
from metahpo.inner.rules.base import RuleState, UpdateRule
from metahpo.inner.unroll import unroll

RULE = "rule."


class Fitted(NamedTuple):
    """Where a training of K steps ended.

    params: the final ones; losses: the K scalar losses before each step; state: the rule's state, step: how many steps
    were taken, and carry: what the last one left, all three to go on with.
    """

    params: Params
    losses: list[Tensor]
    state: RuleState
    step: int
    carry: Any = None


class InnerProblem:
    """What one training minimises: ``loss(params, hparams, batch) -> scalar``, pure.

    params, hparams: dicts of tensors by name. A hyperparameter whose name begins with "rule." belongs to the update
    rule (``rule_hparams``); the loss gets the others. Every hyperparameter comes by ``hparams``: a tensor that requires
    grad and that the loss captured instead is an error, wherever the first batch shows it.

    carry: what a step leaves to the next one beside the parameters, as at the first step: the buffers of a net, by
    name, or any tree of tensors; None: nothing. With one, the loss is ``loss(params, hparams, batch, carry) -> (scalar,
    new carry)``, and the outer loss ``outer_loss(params, hparams, carry)`` gets what the last step left. It is a
    constant to every derivative, as buffers are in a training by ``torch.optim``.
    """

    def __init__(self, loss: Callable[..., Any], carry: Any = None):
        self.loss, self.carry = Lent(by_formula(loss), 2, "the inner loss"), constants(carry)

    def value(self, params: Params, hparams: Params, batch: Any, carry: Any) -> tuple[Tensor, Any]:
        """(the loss, the new carry)."""
        if self.carry is None:
            return self.loss(params, hparams, batch), None
        value, carry = self.loss(params, hparams, batch, constants(carry))
        return value, constants(carry)

    def inner_loss(self, params: Params, carry: Any, batch: tuple[Params, Any], step: int) -> tuple[Tensor, Any]:
        """The loss as ``unroll`` takes it; batch: (the loss's hyperparameters, the data)."""
        return self.value(params, *batch, carry)

    def fit(
        self,
        rule: UpdateRule,
        params: Params,
        hparams: Params,
        batches: Iterable[Any],
        *,
        gradient: InnerGradient = Reverse(),
        remat: Remat = NoRemat(),
        state: RuleState = None,
        step: int = 0,
        carry: Any = None,
    ) -> Fitted:
        """Trains for one step a batch from ``params``; differentiable in params, state and hparams.

        state, step, carry: of an earlier ``Fitted``, to go on from there.
        """
        given, own = split(hparams)
        pairs = [(given, batch) for batch in batches]
        carried = (_init(rule, own, params) if state is None else state, own)
        path = unroll(
            self.inner_loss,
            _Given(rule),
            params,
            pairs,
            carry=self.carry if carry is None else carry,
            gradient=gradient,
            remat=remat,
            keep_steps=False,
            state=carried,
            first=step,
        )
        return Fitted(path.params, path.losses, path.state[0], step + len(pairs), path.carry)


class _Given(UpdateRule):
    """A rule with the hyperparameters that its state carries: so they reach every step by its arguments, as ``Mixed``
    and rematerialisation ask."""

    def __init__(self, rule: UpdateRule):
        super().__init__()
        # Not as a submodule, whose own parameters would be handed around too.
        self._rule = [rule]
        self.needs_loss = getattr(rule, "needs_loss", False)
        self.skips_unused = getattr(rule, "skips_unused", False)

    def forward(self, params: Params, grads: Params, state: RuleState, step: int, *loss: Any) -> tuple[Params, Any]:
        inner, own = state
        params, inner = call_with(self._rule[0], own, (params, grads, inner, step, *loss))
        return params, (inner, own)


def _init(rule: UpdateRule, own: Params, params: Params) -> RuleState:
    with torch.no_grad():
        return rule.init({name: p.detach() for name, p in params.items()})


def constants(tree: Any) -> Any:
    """The same tree of tensors cut from its graph."""
    if type(tree) is dict and all(isinstance(value, Tensor) for value in tree.values()):
        return {name: value.detach() for name, value in tree.items()}  # Several times faster.
    return tree_map_only(Tensor, torch.detach, tree)


def split(hparams: Mapping[str, Tensor]) -> tuple[Params, Params]:
    """(the loss's hyperparameters, the rule's by its own names)."""
    own = {name.removeprefix(RULE): h for name, h in hparams.items() if name.startswith(RULE)}
    return {name: h for name, h in hparams.items() if not name.startswith(RULE)}, own


def rule_hparams(rule: UpdateRule, *names: str) -> Params:
    """Copies of the rule's hyperparameters, all or those named, as "rule.NAME": entries for ``hparams``.

    Raises HypergradientError for a name that the rule does not have.
    """
    own = dict(rule.named_parameters())
    for name in names:
        if name not in own:
            raise HypergradientError(f"{type(rule).__name__} has no hyperparameter {name!r}; {did_you_mean(name, own)}")
    return {RULE + name: own[name].detach().clone() for name in names or own}
