"""How the gradient of an inner step is taken, and what an outer gradient sees of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import grad_and_value

from metahpo.functional.trees import Params, map_tree

# (params, carry, batch, step) -> (loss, carry): the carry (buffers, counters) goes from step to step.
InnerLoss = Callable[[Params, Any, Any, int], tuple[Tensor, Any]]


class InnerGradient(Protocol):
    def __call__(
        self, loss: InnerLoss, params: Params, carry: Any, batch: Any, step: int
    ) -> tuple[Params, Tensor, Any]:
        """(gradient by name, loss, new carry) at ``params``."""
        ...


@dataclass(frozen=True)
class Reverse:
    """Reverse mode, itself differentiable: an outer gradient is exact (second order)."""

    def __call__(
        self, loss: InnerLoss, params: Params, carry: Any, batch: Any, step: int
    ) -> tuple[Params, Tensor, Any]:
        grads, (value, carry) = grad_and_value(loss, has_aux=True)(params, carry, batch, step)
        return grads, value, carry


@dataclass(frozen=True)
class FirstOrder:
    """Reverse mode taken as a constant: an outer gradient ignores how the inner one depends on anything (Finn et al.
    2017, section 5.2).

    ``no_grad`` keeps the outer tape from growing; ``detach`` stops forward-mode tangents, which ``no_grad`` lets
    through.
    """

    def __call__(
        self, loss: InnerLoss, params: Params, carry: Any, batch: Any, step: int
    ) -> tuple[Params, Tensor, Any]:
        with torch.no_grad():
            grads, value, carry = Reverse()(loss, map_tree(torch.detach, params), carry, batch, step)
        return map_tree(torch.detach, grads), value.detach(), carry
