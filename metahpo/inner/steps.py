"""The steps of an inner loop, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor

from metahpo.functional.levels import under_torch_func
from metahpo.functional.trees import Params
from metahpo.inner.gradient import InnerGradient, InnerLoss, StepLoss, zeros_for_unused
from metahpo.inner.randomness import same_draws
from metahpo.inner.rules.base import RuleState

Update = Callable[..., tuple[Params, RuleState]]
_BLOCK = 256


class Losses:
    """The losses of the steps, in order.

    Those without a graph are copied into one block after the other. As tensors of their own, each between the large
    ones that come and go with its step, they would keep the C library from using that memory again: a long training's
    would grow by a fragment a step.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._count = 0
        self._apart: list[Tensor] = []

    def add(self, value: Tensor) -> None:
        if self._apart or value.requires_grad or under_torch_func():
            self._apart.append(value)
            return
        place = self._count % _BLOCK
        if not place:
            self._blocks.append(value.new_empty(_BLOCK))
        self._blocks[-1][place] = value
        self._count += 1

    def stretches(self) -> list[Tensor]:
        """As vectors of any length, of those without a graph alone."""
        return [block[: self._count - i * _BLOCK] for i, block in enumerate(self._blocks)]

    def all(self) -> list[Tensor]:
        """As scalars."""
        return [*(value for part in self.stretches() for value in part.unbind()), *self._apart]


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

    update: ``(params, grads, state, step)``, and a fifth argument, the ``StepLoss``, if its ``needs_loss`` is true. It
    gets zeros for the gradient of a tensor that the loss does not use, or None if its ``skips_unused`` is true. The
    gradient and what the update makes of the step's loss see the same random numbers (dropout).
    """
    params, state, carry = start
    needs_loss = getattr(update, "needs_loss", False)
    skips_unused = getattr(update, "skips_unused", False)
    losses, kept = Losses(), []
    for step, batch in enumerate(batches, start=first):
        its_loss = same_draws(loss, params.values()) if needs_loss else loss
        arguments = (StepLoss(its_loss, carry, batch, step),) if needs_loss else ()
        grads, value, carry = gradient(its_loss, params, carry, batch, step)
        if not skips_unused and any(g is None for g in grads.values()):
            grads = zeros_for_unused(grads, params)
        params, state = update(params, grads, state, step, *arguments)
        losses.add(value)
        if keep:
            kept.append(params)
    return Steps(params, state, carry, losses.all(), kept)
