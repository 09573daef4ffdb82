"""How the gradient of an inner step is taken, and what an outer gradient sees of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import grad
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from metahpo.functional.levels import under_torch_func
from metahpo.functional.trees import Params, map_tree

# (params, carry, batch, step) -> (loss, carry): the params are fitted; the carry (buffers, counters) goes from step to
# step; the batch is all else that the step sees, data and whatever the outer loop differentiates (hyperparameters,
# weights that are not adapted). A captured tensor should be a constant: Mixed and remat refuse any other.
InnerLoss = Callable[[Params, Any, Any, int], tuple[Tensor, Any]]

# By name; None for a tensor that the loss does not use.
Grads = dict[str, Tensor | None]


class StepLoss(NamedTuple):
    """The loss of one step as a function of the parameters alone; a tree of the tensors that it closes over."""

    loss: InnerLoss
    carry: Any
    batch: Any
    step: int

    def __call__(self, params: Params) -> Tensor:
        return self.loss(params, self.carry, self.batch, self.step)[0]


class InnerGradient(Protocol):
    def __call__(
        self, loss: InnerLoss, params: Params, carry: Any, batch: Any, step: int
    ) -> tuple[Grads, Tensor, Any]:
        """(gradient by name, loss, new carry) at ``params``; the gradient of a tensor that the loss does not use is
        None, which a rule should tell from zeros as ``torch.optim`` does."""
        ...


def zeros_for_unused(grads: Mapping[str, Tensor | None], params: Params) -> Params:
    """The gradients with zeros in place of None."""
    return {name: torch.zeros_like(params[name]) if g is None else g for name, g in grads.items()}


@dataclass(frozen=True)
class Reverse:
    """Reverse mode, itself differentiable: an outer gradient is exact (second order)."""

    def __call__(
        self, loss: InnerLoss, params: Params, carry: Any, batch: Any, step: int
    ) -> tuple[Grads, Tensor, Any]:
        if not under_torch_func():
            return _by_autograd(loss, params, carry, batch, step)
        # torch.func lets only tensors out of a gradient; the rest of the carry goes around it.
        around: list[Any] = []

        def tensors_out(params: Params) -> tuple[Tensor, Any]:
            value, new = loss(params, carry, batch, step)
            leaves, spec = tree_flatten(new)
            # torch.func makes the gradient of an unused tensor zeros: so it is taken here, at the level that ``grad``
            # opens, and what ``grad`` itself differentiates is a constant.
            inputs = list(params.values())
            grads: Sequence[Tensor | None] = [None] * len(inputs)
            if value.requires_grad:
                grads = torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True)
            around[:] = [leaves, spec, [g is not None for g in grads]]
            out = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            return value.detach(), (value, [g for g in grads if g is not None], out)

        _, (value, found, tensors) = grad(tensors_out, has_aux=True)(params)
        leaves, spec, used = around
        given, left = iter(tensors), iter(found)
        grads = {name: next(left) if its else None for name, its in zip(params, used)}
        return grads, value, tree_unflatten([next(given) if isinstance(x, Tensor) else x for x in leaves], spec)


def _by_autograd(loss: InnerLoss, params: Params, carry: Any, batch: Any, step: int) -> tuple[Grads, Tensor, Any]:
    """The same without torch.func, which takes several times longer for each operation."""
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: the gradient counts what the loss does with the parameters given, and not with the same tensors that it
        # may hold by another way (the initial weights in a regulariser).
        here = {name: p.view_as(p) if p.requires_grad else p.detach().requires_grad_() for name, p in params.items()}
        value, carry = loss(here, carry, batch, step)
        grads = torch.autograd.grad(value, list(here.values()), create_graph=twice, allow_unused=True)
    if not twice:
        value = value.detach()
        carry = tree_map_only(Tensor, torch.detach, carry)
    return dict(zip(here, grads)), value, carry


@dataclass(frozen=True)
class FirstOrder:
    """Reverse mode taken as a constant: an outer gradient ignores how the inner one depends on anything (Finn et al.
    2017, section 5.2).

    ``no_grad`` keeps the outer tape from growing; ``detach`` stops forward-mode tangents, which ``no_grad`` lets
    through.
    """

    def __call__(
        self, loss: InnerLoss, params: Params, carry: Any, batch: Any, step: int
    ) -> tuple[Grads, Tensor, Any]:
        with torch.no_grad():
            grads, value, carry = Reverse()(loss, map_tree(torch.detach, params), carry, batch, step)
        return {name: g if g is None else g.detach() for name, g in grads.items()}, value.detach(), carry
