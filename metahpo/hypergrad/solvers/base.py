"""What every solver takes and gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from metahpo.errors import HypergradientError

# A matrix, never formed: vector [P] -> vector [P].
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """An approximate solution v of A v = g.

    v: [P]; residual: |g - A v| / |g| as it is, not as estimated (0 where g = 0), a scalar tensor, so that a solver need
    not wait for the device; steps: how many the solver took; tolerance: the residual asked for; note: what else the
    caller should know.
    """

    v: Tensor
    residual: Tensor
    steps: int
    tolerance: float
    note: str = ""

    @property
    def converged(self) -> bool:
        """Whether the residual is within the tolerance. Waits for the device."""
        return bool(self.residual <= self.tolerance)


class Solver(Protocol):
    """A way to solve A v = g by products with A alone.

    system: what A is. "hessian": the inner loss's Hessian, symmetric. "map": I - J^T, with J the Jacobian of one update
    of (params, rule state). advice: what to change where it has not converged.
    """

    system: ClassVar[Literal["hessian", "map"]]
    advice: ClassVar[str]

    def __call__(self, product: Product, rhs: Tensor, start: Tensor | None = None) -> Solution:
        """product: v -> A v; rhs: g, [P]; start: an earlier v of a system like this one, [P]."""
        ...


def first_guess(product: Product, rhs: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """(v, g - A v) for ``start``, or for zero where there is none or where it is worse than zero."""
    if start is None:
        return torch.zeros_like(rhs), rhs
    left = rhs - product(start)
    # On the device: a comparison with a NaN is false.
    better = left.norm() < rhs.norm()
    return torch.where(better, start, 0), torch.where(better, left, rhs)


def relative(residual: Tensor, rhs: Tensor) -> Tensor:
    """|residual| / |rhs|, and 0 / 0 = 0."""
    size = rhs.norm()
    return residual.norm() / torch.where(size > 0, size, 1)


def check_settings(solver: object, *, steps: int, tolerance: float, **positive: float) -> None:
    """Raises HypergradientError for settings that no solver can have. positive: numbers that should be above zero."""
    name = type(solver).__name__
    if type(steps) is not int or steps < 1:
        raise HypergradientError(f"{name}: steps should be a number of at least 1, found {steps!r}")
    if not tolerance >= 0:
        raise HypergradientError(f"{name}: tolerance should be at least 0, found {tolerance!r}")
    for key, value in positive.items():
        if not 0 < value < math.inf:
            raise HypergradientError(f"{name}: {key} should be above 0 and finite, found {value!r}")
