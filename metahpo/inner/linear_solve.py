"""Symmetric linear systems by conjugate gradients, differentiated without the iterations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from metahpo.checks import check_number, check_whole
from metahpo.errors import NetArgumentError, NetError
from metahpo.functional.levels import levels

# (tree of tensors, v [n]) -> A v [n]; A is symmetric and positive definite, and depends on the tree.
Operator = Callable[[Any, Tensor], Tensor]
# The same as a function of the tree alone, which may prepare what all products with one A share.
Products = Callable[[Any], Callable[[Tensor], Tensor]]
# (product with A, b) -> x.
Solve = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class ConjugateGradients:
    """Solves A x = b to ``|b - A x| <= tolerance * |b|`` in at most ``steps`` products with A (Hestenes and Stiefel
    1952).

    tolerance: None for 2e-12 in float64 and 6e-6 in float32, about the 3/4 power of their precision. Warns with the
    residual and the steps when that was not reached, which A's being not positive definite may be the cause of too.
    """

    steps: int = 200
    tolerance: float | None = None

    def __post_init__(self):
        check_whole(self, "steps", self.steps, at_least=1, error=NetArgumentError)
        if self.tolerance is not None:
            check_number(self, "tolerance", self.tolerance, at_least=0, below=1, error=NetArgumentError)

    def __call__(self, product: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
        """x [n] for b [n]; nothing differentiates through it."""
        tolerance = torch.finfo(b.dtype).eps ** 0.75 if self.tolerance is None else self.tolerance
        x, residual, direction, square = torch.zeros_like(b), b, b, b @ b
        # Squares of small numbers would be lost before the numbers are.
        target, going, count = tolerance**2 * square, square > 0, 0
        while count < self.steps and _anywhere(going):
            image = product(direction)
            curvature = direction @ image
            positive = going & (curvature > 0)
            size = torch.where(positive, square / torch.where(positive, curvature, 1.0), 0.0)
            x, residual = x + size * direction, residual - size * image
            new = residual @ residual
            direction = residual + torch.where(positive, new / torch.where(positive, square, 1.0), 0.0) * direction
            square, going, count = new, positive & (new > target), count + 1
        self._warn(square, b @ b, target, count)
        return x

    def _warn(self, square: Tensor, start: Tensor, target: Tensor, count: int) -> None:
        missed = ~(square <= target)
        if torch.compiler.is_compiling() or not _anywhere(missed):
            return
        ratio = _value((square / torch.where(start > 0, start, 1.0)).sqrt()).max().item()
        warnings.warn(
            f"conjugate gradients did not converge: relative residual {ratio:.1e} after {count} steps; the curvature "
            "may not be positive (take more damping), or allow more steps or a larger tolerance",
            stacklevel=2,
        )


def damped_solve(product: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """An approximate solution of (A + damping I) x = b after exactly ``steps`` products, and the damping.

    Conjugate gradients with a damping of 0 as long as A is positive definite along their directions. Where one has a
    curvature c <= 0 the damping grows by 2 |c|, and they begin again from x. No number is looked at, which a GPU would
    wait for.
    """
    x, residual, direction, square = torch.zeros_like(b), b, b, b @ b
    damping, going = torch.zeros_like(square), square > 0
    # Squares of small numbers would be lost before the numbers are.
    target = torch.finfo(b.dtype).eps ** 1.5 * square
    for _ in range(steps):
        image = product(direction) + damping * direction
        bend, length = direction @ image, torch.where(going, direction @ direction, 1.0)
        positive, bent = going & (bend > 0), going & (bend <= 0)
        # Where the curvature is exactly zero by what rounding would make of it.
        least = torch.finfo(b.dtype).eps ** 0.5 * (image @ image / length).sqrt()
        more = torch.where(bent, 2 * bend.abs() / length + least, 0.0)
        size = torch.where(positive, square / torch.where(positive, bend, 1.0), 0.0)
        x, damping = x + size * direction, damping + more
        residual = residual - size * image - more * x
        new = residual @ residual
        direction = residual + torch.where(positive, new / torch.where(positive, square, 1.0), 0.0) * direction
        square, going = new, (positive | bent) & (new > target)
    return x, damping


def solve(operator: Operator, tree: Any, b: Tensor, solver: ConjugateGradients) -> Tensor:
    """x with ``operator(tree, x) = b``, all [n], differentiable once in b and in all that A depends on, in reverse and
    forward mode (the implicit function theorem: a derivative is one more solve with the same A).

    NetError where the derivative itself is differentiated.
    """
    constants = tree_map_only(Tensor, torch.detach, tree)
    with torch.no_grad():
        x = solver(lambda v: operator(constants, v), b.detach()).detach()
    return x + correction(lambda tree: partial(operator, tree), tree, b - operator(tree, x), solver)


def correction(products: Products, tree: Any, residual: Tensor, solver: Solve) -> Tensor:
    """Zero, with the derivative A^-1 d(residual): what is to be added to a solution of residual = 0 that was found
    without derivatives, A the residual's negative Jacobian there (the implicit function theorem)."""
    leaves, spec = tree_flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def inverse(v: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        given = list(others)
        for i, tensor in zip(places, tensors):
            given[i] = tensor.detach()
        rebuilt = tree_unflatten(given, spec)
        with torch.no_grad():
            return solver(products(rebuilt), v.detach())

    return _Inverse.apply(inverse, residual, *(leaves[i] for i in places))  # type: ignore[return-value]


class _Inverse(torch.autograd.Function):
    """Zero, with the derivative A^-1: of a residual that is zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inverse: Callable[..., Tensor], residual: Tensor, *tensors: Tensor) -> Tensor:
        return torch.zeros_like(residual)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.inverse, ctx.count = inputs[0], len(inputs) - 2
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor):  # type: ignore[override]
        solved = ctx.inverse(cotangent, ctx.saved_tensors)
        return None, _Once.apply(solved, cotangent, *ctx.saved_tensors), *[None] * ctx.count

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor, *others: Any):  # type: ignore[override]
        return ctx.inverse(tangent, ctx.saved_tensors)


class _Once(torch.autograd.Function):
    """The first argument, which depends on the others in a way that is not differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(solved: Tensor, *others: Tensor) -> Tensor:
        return solved.view_as(solved)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Any):  # type: ignore[override]
        raise NetError("a rule that solves for its step (Newton, Gauss-Newton) has first derivatives alone")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any):  # type: ignore[override]
        raise NetError("a rule that solves for its step (Newton, Gauss-Newton) has first derivatives alone")


def _anywhere(mask: Tensor) -> bool:
    """Whether the mask is true, for any of the tasks under ``vmap``; a compiler, which cannot know, takes all steps."""
    return torch.compiler.is_compiling() or bool(_value(mask).any())


def _value(tensor: Tensor) -> Tensor:
    *_, value = levels(tensor)
    return value
