"""What an inner loop keeps for its backward pass, and what that computes again (rematerialisation)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from metahpo.checks import check_whole
from metahpo.errors import NetArgumentError
from metahpo.functional.trees import Params
from metahpo.inner.explicit import explicit, explicit_at_first
from metahpo.inner.gradient import InnerGradient, InnerLoss
from metahpo.inner.recompute import cut, pull_by_reverse, recomputed
from metahpo.inner.rules.base import RuleState, UpdateRule
from metahpo.inner.steps import Steps, take_steps


class Remat(Protocol):
    def segments(self, batches: Iterable[Any]) -> Iterator[list[Any]] | None:
        """The batches in groups, each a stretch of steps that is computed again as one; None: nothing is."""
        ...


@dataclass(frozen=True)
class NoRemat:
    """Keeps all that every step needs."""

    def segments(self, batches: Iterable[Any]) -> None:
        return None


@dataclass(frozen=True)
class Every:
    """Keeps the state of the loop before every k-th step, and computes the k steps after it again: one more forward
    pass, and the memory of K/k states and of k steps."""

    k: int

    def __post_init__(self):
        object.__setattr__(self, "k", check_whole(self, "k", self.k, at_least=1, error=NetArgumentError))

    def segments(self, batches: Iterable[Any]) -> Iterator[list[Any]]:
        left = iter(batches)
        while group := list(islice(left, self.k)):
            yield group


@dataclass(frozen=True)
class Sqrt:
    """``Every(k)`` with k the square root of the number of steps, rounded up, which makes K/k + k smallest (Chen et al.
    2016, "Training Deep Nets with Sublinear Memory Cost", section 4.1)."""

    def segments(self, batches: Iterable[Any]) -> Iterator[list[Any]]:
        batches = list(batches)
        return Every(max(math.isqrt(len(batches) - 1) + 1, 1) if batches else 1).segments(batches)


def named_remat(setting: int | str) -> Remat:
    """As configs name them: "none", "sqrt", or N for ``Every(N)``."""
    if not isinstance(setting, str):
        return Every(setting)
    return Sqrt() if setting == "sqrt" else NoRemat()


def recomputed_steps(
    loss: InnerLoss,
    rule: UpdateRule,
    gradient: InnerGradient,
    start: tuple[Params, RuleState, Any],
    batches: list[Any],
    first: int,
    keep: bool,
) -> Steps:
    """``take_steps``, of which only the arguments are kept: a backward pass takes the steps again.

    Raises NetError if, in step 0, the loss or a rule that is no module computes with a captured tensor that requires
    grad.
    """

    def update(arguments, rates):
        given = rule
        if rates:
            # By name: a functional_call around the loop may give the rule others than it has in the backward pass.
            given = _with_parameters(rule, {id(p): rates[name] for name, p in rule.named_parameters()}, {})
        return given(*arguments)

    def take(loss, update, tree) -> Steps:
        start, batches, rates = tree

        def with_rates(*arguments):
            return update(arguments, rates)

        for flag in ("needs_loss", "skips_unused"):
            setattr(with_rates, flag, getattr(rule, flag, False))
        return take_steps(loss, with_rates, gradient, start, batches, first, keep)

    rates = dict(rule.named_parameters()) if isinstance(rule, nn.Module) else {}
    watched, pull = explicit_at_first(loss, "the inner loss"), pull_by_reverse(lambda tree: take(loss, update, tree))
    return recomputed(lambda tree: take(watched, _watched(update), tree), pull, (start, batches, rates))


def _with_parameters(module: nn.Module, new: dict[int, Tensor], made: dict[int, nn.Module]) -> nn.Module:
    """A copy of ``module`` that has other parameters, ``new`` by the ``id`` of its own, and all else in common with it.

    Unlike ``functional_call``, which changes the module itself while it runs: other threads would see that. made: the
    copies of modules so far, by ``id``, as one may stand in several places.
    """
    if id(module) not in made:
        made[id(module)] = twin = object.__new__(type(module))
        twin.__dict__.update(vars(module))
        twin.__dict__["_parameters"] = {
            name: p if p is None else new.get(id(p), p) for name, p in module._parameters.items()
        }
        twin.__dict__["_modules"] = {
            name: child if child is None else _with_parameters(child, new, made)
            for name, child in module._modules.items()
        }
    return made[id(module)]


def _watched(update: Callable[..., Any]) -> Callable[..., Any]:
    """In step 0 looked at with the tape on, where alone a captured tensor shows, and cut from it again."""

    def call(arguments: Sequence[Any], rates: Params) -> Any:
        if arguments[3]:
            return update(arguments, rates)
        with torch.enable_grad():
            return cut(explicit(update, "the update rule")(arguments, rates))

    return call
