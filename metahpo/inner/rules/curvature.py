"""What the rules that solve for their step share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import grad
from torch.utils._pytree import tree_leaves

from metahpo.checks import check_type
from metahpo.errors import NetArgumentError
from metahpo.functional.trees import Params
from metahpo.inner.gradient import StepLoss
from metahpo.inner.linear_solve import ConjugateGradients, solve
from metahpo.inner.randomness import same_draws
from metahpo.inner.rules.base import UpdateRule


class CurvatureRule(UpdateRule):
    """A rule whose step solves (C + damping * I) d = gradient by conjugate gradients, C a curvature matrix of the loss;
    a subclass writes its ``product`` with a vector.

    solver: the most steps of a solve, and its tolerance; a solve that does not converge warns. An outer gradient sees
    its solution and not its iterations: exact where they converged, once (NetError for second derivatives), in reverse
    and forward mode. ``FirstOrder`` takes the gradient alone as a constant, not C.
    """

    needs_loss = True

    def __init__(self, solver: ConjugateGradients):
        super().__init__()
        expected = "ConjugateGradients(...)"
        self.solver = check_type(self, "solver", solver, ConjugateGradients, expected, error=NetArgumentError)

    def product(self, params: Params, direction: Params, loss: StepLoss) -> Params:
        """C times ``direction`` at ``params``."""
        raise TypeError(f"{type(self).__name__} does not define product(params, direction, loss)")

    def direction(self, params: Params, grads: Params, damping: Tensor, loss: StepLoss) -> Tensor:
        """The solution d, as one vector in the order of ``params``."""

        def operator(tree: Any, v: Tensor) -> Tensor:
            params, damping, loss = tree
            return flat(self.product(params, split(v, params), loss), params) + damping * v

        # One matrix: with dropout all products see the same mask.
        operator = same_draws(operator, [damping, *params.values()])
        return solve(operator, (params, damping, loss), flat(grads, params), self.solver)


def hessian_product(function: Any, at: Any, direction: Any) -> Any:
    """The Hessian of ``function`` at a tensor or a tree of them, times ``direction``; by two reverse passes, as not
    every layer has a forward mode."""

    def slope(at: Any) -> Tensor:
        pairs = zip(tree_leaves(grad(function)(at)), tree_leaves(direction))
        return torch.stack([(g * d).sum() for g, d in pairs]).sum()

    return grad(slope)(at)


def flat(tree: Params, like: Params) -> Tensor:
    """The tensors as one vector [n], in the order of ``like``."""
    return torch.cat([tree[name].reshape(-1) for name in like])


def split(vector: Tensor, like: Params) -> Params:
    """The tensors that ``flat`` made a vector."""
    parts = vector.split([p.numel() for p in like.values()])
    return {name: part.view_as(p) for (name, p), part in zip(like.items(), parts)}
