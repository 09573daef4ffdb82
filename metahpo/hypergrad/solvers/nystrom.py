"""A low-rank approximation of the Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from metahpo.hypergrad.solvers.base import Product, Solution, check_settings, relative


@dataclass(frozen=True)
class Nystrom:
    """(H_r + damping I) v = g with H_r the Nystrom approximation of H from ``rank`` of its columns, drawn without
    replacement (Hataya and Yamada 2023).

    damping: above zero. seed: of the draw. tolerance: the residual of (H + damping I) v = g above which a warning is
    due.

    Cost: ``rank`` products, one for the residual, and P rank^2 for an orthogonal basis. Memory: 2 rank vectors. Bias:
    the damping, and the eigenvalues that ``rank`` columns do not show; no step size, and no divergence. The one to take
    where few eigenvalues of H are large (wide nets at the end of their training).
    """

    rank: int = 10
    damping: float = 1e-2
    seed: int = 0
    tolerance: float = 1e-2

    system: ClassVar[Literal["hessian", "map"]] = "hessian"
    advice: ClassVar[str] = "raise the rank or the damping"

    def __post_init__(self):
        check_settings(self, "rank", "damping", stops=False)

    def __call__(self, product: Product, rhs: Tensor, start: Tensor | None = None) -> Solution:
        count = rhs.numel()
        rank = min(self.rank, count)
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))[:rank].to(rhs.device)
        columns = torch.stack([product(torch.zeros_like(rhs).index_fill(0, i, 1)) for i in drawn.split(1)], dim=1)
        # H_r = C W^+ C^T, with C the columns and W their rows drawn. In an orthogonal basis Q of C's range the inverse
        # is Q (M + damping I)^-1 Q^T, and 1 / damping across it; Woodbury's form subtracts numbers of 1 / damping^2.
        basis, upper = torch.linalg.qr(columns)
        core = columns[drawn].double()
        upper = upper.double()
        small = upper @ torch.linalg.pinv((core + core.T) / 2, hermitian=True) @ upper.T
        small = small + self.damping * torch.eye(rank, dtype=small.dtype, device=small.device)
        inside = basis.T @ rhs
        across = rhs - basis @ inside
        # Twice: the division would enlarge what rounding left of the range.
        across = across - basis @ (basis.T @ across)
        v = basis @ torch.linalg.solve(small, inside.double()).to(rhs) + across / self.damping
        left = rhs - product(v) - self.damping * v
        return Solution(v, relative(left, rhs), rank, self.tolerance)
