"""The steps of an inner loop, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor

from metahpo.functional.trees import Params
from metahpo.inner.gradient import InnerGradient, InnerLoss, StepLoss
from metahpo.inner.rules.base import RuleState

Update = Callable[..., tuple[Params, RuleState]]


class Steps(NamedTuple):
    """What some steps led to: parameters, the rule's state, the carry; each step's loss and, if kept, parameters."""

    params: Params
    state: RuleState
    carry: Any
    losses: list[Tensor]
    kept: list[Params]


def take_steps(
    loss: InnerLoss,
    update: Update,
    gradient: InnerGradient,
    start: tuple[Params, RuleState, Any],
    batches: Iterable[Any],
    first: int,
    keep: bool,
) -> Steps:
    """One update a batch from ``start`` = (params, state, carry), numbered from ``first``.

    update: ``(params, grads, state, step)``, and a fifth argument, the ``StepLoss``, if its ``needs_loss`` is true.
    """
    params, state, carry = start
    needs_loss = getattr(update, "needs_loss", False)
    losses, kept = [], []
    for step, batch in enumerate(batches, start=first):
        its_loss = (StepLoss(loss, carry, batch, step),) if needs_loss else ()
        grads, value, carry = gradient(loss, params, carry, batch, step)
        params, state = update(params, grads, state, step, *its_loss)
        losses.append(value)
        if keep:
            kept.append(params)
    return Steps(params, state, carry, losses, kept)
