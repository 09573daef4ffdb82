"""Conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from metahpo.errors import HypergradientError
from metahpo.hypergrad.solvers.base import Product, Solution, check_settings, first_guess, relative


@dataclass(frozen=True)
class CG:
    """Conjugate gradients (Hestenes and Stiefel 1952) on (H + damping I) v = g, for hypergradients Pedregosa 2016 and
    Rajeswaran et al. 2019, section 3.

    steps: at most so many; tolerance: it stops at this relative residual; damping: added to the Hessian's diagonal.

    Cost: a product a step and two more at most; the residual falls as ((sqrt(k) - 1) / (sqrt(k) + 1))^steps with k the
    condition number, and ends after as many steps as H has different eigenvalues. Memory: four vectors. Bias: none at
    convergence, but for the damping. It waits for the device once a step. The one to take where the training reaches a
    minimum with H positive definite; where it meets negative curvature it stops and says so.
    """

    steps: int = 100
    tolerance: float = 1e-4
    damping: float = 0.0

    system: ClassVar[Literal["hessian", "map"]] = "hessian"
    advice: ClassVar[str] = "take more steps, or damping"

    def __post_init__(self):
        check_settings(self, steps=self.steps, tolerance=self.tolerance)
        if not self.damping >= 0:
            raise HypergradientError(f"CG: damping should be at least 0, found {self.damping!r}")

    def __call__(self, product: Product, rhs: Tensor, start: Tensor | None = None) -> Solution:
        def damped(v: Tensor) -> Tensor:
            return product(v) + self.damping * v if self.damping else product(v)

        v, left = first_guess(damped, rhs, start)
        direction, square = left, left @ left
        goal, taken, note = (self.tolerance * rhs.norm()) ** 2, 0, ""
        enough = bool(square <= goal)
        while taken < self.steps and not enough:
            pushed = damped(direction)
            curvature = direction @ pushed
            size = square / curvature
            new = left - size * pushed
            new_square = new @ new
            # One look at the device a step. A NaN fails the first.
            positive, enough = torch.stack([curvature > 0, new_square <= goal]).tolist()
            if not positive:
                if bool(curvature <= 0):
                    bent = float(curvature / (direction @ direction))
                    note = f"met curvature {bent:.1e}, which is not a minimum's; train for longer or add damping"
                else:
                    v = v * torch.nan
                break
            v = v + size * direction
            direction = new + (new_square / square) * direction
            left, square, taken = new, new_square, taken + 1
        return Solution(v, relative(rhs - damped(v), rhs), taken, self.tolerance, note)
