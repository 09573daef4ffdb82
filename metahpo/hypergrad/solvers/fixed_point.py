"""Fixed-point iteration on the map of the update rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from metahpo.hypergrad.solvers.base import Product, Solution, check_settings, first_guess, relative


@dataclass(frozen=True)
class FixedPoint:
    """v <- J^T v + g, with J the Jacobian of one update of (params, rule state) (Grazzi et al. 2020, approximate
    implicit differentiation by fixed point): reverse mode through ``steps`` repetitions of the last update.

    steps: at most so many; tolerance: it stops at this relative residual.

    Cost: a vector-Jacobian product of the update a step. Memory: two vectors of the size of params and state. It waits
    for the device once a step. Bias: at a fixed point of the update the error falls as the rate of contraction to the
    power of ``steps``, as fast as the training itself converges. The one to take where the training ends elsewhere than
    at a minimum of the inner loss alone (a weight decay of the rule's), or for the rule's own hyperparameters at such
    an end; with rules whose update is smooth there and repeats itself (SGD with momentum, not Adam).
    """

    steps: int = 100
    tolerance: float = 1e-4

    system: ClassVar[Literal["hessian", "map"]] = "map"
    advice: ClassVar[str] = "take more steps, or train for longer"

    def __post_init__(self):
        check_settings(self, steps=self.steps, tolerance=self.tolerance)

    def __call__(self, product: Product, rhs: Tensor, start: Tensor | None = None) -> Solution:
        v, left = first_guess(product, rhs, start)
        taken, residual = 0, relative(left, rhs)
        while taken < self.steps and bool(residual > self.tolerance):
            v, taken = v + left, taken + 1
            left = rhs - product(v)
            residual = relative(left, rhs)
        return Solution(v, residual, taken, self.tolerance)
