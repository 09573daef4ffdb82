"""The Neumann series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from metahpo.hypergrad.solvers.base import Product, Solution, check_settings, first_guess, relative


@dataclass(frozen=True)
class Neumann:
    """v = scale * sum over k = 0 ... steps of (I - scale H)^k g (Lorraine et al. 2020, algorithm 3): what reverse mode
    through so many more steps of gradient descent at rate ``scale`` would give.

    scale: below 2 over the largest eigenvalue of H, or the series diverges; the training's rate is one that does not.
    tolerance: the relative residual above which a warning is due.

    Cost: ``steps`` products, and one for the residual. Memory: two vectors. It never waits for the device. Bias: what
    the series leaves out, (I - scale H)^(steps + 1) of the solution; directions of little curvature are damped as by
    stopping early. The one to take for millions of parameters and hyperparameters, and every few steps of a training.
    """

    steps: int = 20
    scale: float = 0.1
    tolerance: float = 1e-2

    system: ClassVar[Literal["hessian", "map"]] = "hessian"
    advice: ClassVar[str] = "take more steps, or a lower scale where it is above 1"

    def __post_init__(self):
        check_settings(self, "steps", "scale", stops=False)

    def __call__(self, product: Product, rhs: Tensor, start: Tensor | None = None) -> Solution:
        v, left = first_guess(product, rhs, start)
        for _ in range(self.steps):
            v = torch.add(v, left, alpha=self.scale)
            left = torch.sub(left, product(left), alpha=self.scale)
        # ``left`` is g - H v; the last term of the series is free, the look at the outcome is not.
        v = torch.add(v, left, alpha=self.scale)
        return Solution(v, relative(rhs - product(v), rhs), self.steps, self.tolerance)
