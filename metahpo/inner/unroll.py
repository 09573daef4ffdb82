"""The inner loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from metahpo.functional.trees import Params
from metahpo.inner.gradient import InnerGradient, InnerLoss, Reverse
from metahpo.inner.rules.base import RuleState, UpdateRule


class Trajectory(NamedTuple):
    """What an inner loop of K steps went through.

    params: the final ones; steps: the K parameter dicts after each update (the last is ``params``); losses: the K
    scalar losses before each update; carry, state: the loss's and the rule's after the last step.
    """

    params: Params
    steps: list[Params]
    losses: list[Tensor]
    carry: Any
    state: RuleState


def unroll(
    loss: InnerLoss,
    rule: UpdateRule,
    params: Params,
    batches: Iterable[Any],
    *,
    carry: Any = None,
    gradient: InnerGradient = Reverse(),
) -> Trajectory:
    """Fits ``params`` by ``rule``, one update a batch; differentiable in all that it is given, as far as ``gradient``
    lets it.

    loss: pure, ``(params, carry, batch, step) -> (scalar, carry)``; batches: what each step sees (for MAML the same
    support set K times); carry: whatever one call of the loss leaves to the next, such as running statistics.
    """
    state, steps, losses = rule.init(params), [], []
    for step, batch in enumerate(batches):
        grads, value, carry = gradient(loss, params, carry, batch, step)
        params, state = rule(params, grads, state, step)
        steps.append(params)
        losses.append(value)
    return Trajectory(params, steps, losses, carry, state)
