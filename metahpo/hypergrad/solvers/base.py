"""What every solver takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from metahpo.checks import check_number, check_whole
from metahpo.errors import HypergradientArgumentError

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


def check_settings(solver: object, count: str = "steps", *positive: str, stops: bool = True) -> None:
    """Makes the settings Python's own numbers; raises HypergradientError for those that no solver can have.

    count: the name of a whole number of at least 1; positive: of numbers that should be above zero; stops: whether it
    stops at its tolerance, or only warns above it.
    """
    bounds: dict[str, dict[str, float]] = {
        # Where it stops at a tolerance of 1 zero is a solution, and so the gradient.
        "tolerance": {"at_least": 0, "below": 1} if stops else {"at_least": 0, "infinite": True},
        "damping": {"at_least": 0},
        **{key: {"above": 0} for key in positive},
    }
    settings = vars(solver)
    whole = {count: 1, "seed": 0}
    for key in whole.keys() & settings.keys():
        value = check_whole(solver, key, settings[key], at_least=whole[key], error=HypergradientArgumentError)
        object.__setattr__(solver, key, value)
    for key in bounds.keys() & settings.keys():
        value = check_number(solver, key, settings[key], **bounds[key], error=HypergradientArgumentError)
        object.__setattr__(solver, key, value)
