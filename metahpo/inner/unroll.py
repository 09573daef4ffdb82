"""The inner loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from metahpo.functional.trees import Params
from metahpo.inner.gradient import FirstOrder, InnerGradient, InnerLoss, Reverse
from metahpo.inner.randomness import repeatable
from metahpo.inner.remat import NoRemat, Remat, recomputed_steps
from metahpo.inner.rules.base import RuleState, UpdateRule
from metahpo.inner.steps import take_steps


class Trajectory(NamedTuple):
    """What an inner loop of K steps went through.

    params: the final ones; steps: the K parameter dicts after each update (the last is ``params``), or the last alone;
    losses: the K scalar losses before each update; carry, state: the loss's and the rule's after the last step.
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
    remat: Remat = NoRemat(),
    keep_steps: bool = True,
    state: RuleState = None,
    first: int = 0,
) -> Trajectory:
    """Fits ``params`` by ``rule``, one update a batch; differentiable in all that it is given, as far as ``gradient``
    lets it.

    loss: pure, ``(params, carry, batch, step) -> (scalar, carry)``; batches: all that a step sees beside its parameters
    (for MAML the same support set K times, with the weights that are not adapted); carry: whatever one call of the loss
    leaves to the next, such as running statistics. remat: what the backward pass computes again to save memory; then,
    as with ``Mixed``, the loss gets every tensor that an outer gradient should reach by its arguments. keep_steps:
    whether the trajectory holds the parameters after every step, which costs their memory. state, first: the rule's
    state and the number of the first step, to go on where a trajectory ended.
    """
    start = (params, rule.init(params) if state is None else state, carry)
    segments = remat.segments(batches)
    again = segments is not None or not isinstance(gradient, (Reverse, FirstOrder))
    if again and not getattr(rule, "needs_loss", False):
        loss = repeatable(loss)
    if segments is None:
        params, state, carry, losses, steps = take_steps(loss, rule, gradient, start, batches, first, keep_steps)
        return Trajectory(params, steps if keep_steps else [params], losses, carry, state)
    losses, steps = [], []
    for segment in segments:
        part = recomputed_steps(loss, rule, gradient, start, segment, first + len(losses), keep_steps)
        start = (part.params, part.state, part.carry)
        losses += part.losses
        steps += part.kept
    params, state, carry = start
    return Trajectory(params, steps if keep_steps else [params], losses, carry, state)
