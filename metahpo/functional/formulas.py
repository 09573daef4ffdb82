"""Formulas in place of torch's kernels whose second derivative is wrong or missing, or which vmap lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metahpo.functional.levels import of_each_task, under_torch_func
from metahpo.functional.weighted_losses import weighted


class ByFormula(TorchFunctionMode):
    """Inside it such functions run by formula: their values are torch's, to rounding, and so are first derivatives.

    used: whether any was called, without which a net need not enter again; under_vmap: whether one was that has a
    formula there alone (``torch.empty``), without which it need not enter again there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used = self.under_vmap = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = kwargs or {}
        formula = _FORMULAS.get(func) or weighted(func, args, given)
        kernel = formula is _embedding and not given.get("sparse", args[6:7] == (True,))
        if formula is None or kernel or (formula is _normalize and given.get("out") is None):
            return func(*args, **given)
        self.under_vmap |= formula is _empty
        self.used |= formula is not _empty
        return formula(*args, **given)


def by_formula(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which runs inside ``ByFormula`` if its first call shows that it has to."""
    needed = under_vmap = True

    def call(*arguments: Any) -> Any:
        nonlocal needed, under_vmap
        if not (needed or (under_vmap and under_torch_func())) or torch.compiler.is_compiling():
            try:
                return function(*arguments)
            except RuntimeError as error:
                # Weights of classes that a later batch alone uses.
                if "is not differentiable with respect to argument" not in str(error):
                    raise
        with ByFormula() as mode:
            result = function(*arguments)
        needed, under_vmap = mode.used, mode.under_vmap
        return result

    return call


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # torch's fused kernel takes the norm for a constant in the second derivative.
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    value = F.relu6(x + 3) / 6
    return x.copy_(value) if inplace else value


def _normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, *, out: Tensor) -> Tensor:
    # Into ``out`` torch's has neither a forward mode nor a rule for vmap. A result there has no derivative.
    return out.copy_(F.normalize(input, p, dim, eps).detach())


def _data(tensor: Tensor) -> Tensor:
    # Under torch.func ``tensor.data`` is a constant to one derivative and none to the next.
    return tensor.detach() if under_torch_func() else tensor.data


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    # A sparse gradient meets dense ones in every update rule, and has no second derivative.
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, False)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    rows = F.embedding(input, weight, None, max_norm, norm_type, scale_grad_by_freq)
    if padding_idx is None:
        counted = torch.ones_like(input, dtype=torch.bool)
    else:
        counted = input != padding_idx % weight.shape[0]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    if offsets is not None:
        # Of all rows, [bags, n, D]: which are in a bag is known to tensors alone.
        bag = (torch.arange(len(input), device=input.device)[:, None] >= offsets).sum(1) - 1
        count = len(offsets) - int(include_last_offset)
        counted = (bag == torch.arange(count, device=input.device)[:, None]) & counted
        rows = rows.expand(count, *rows.shape)
    mask = counted.unsqueeze(-1)
    if mode == "max":
        found = torch.where(mask, rows, -torch.inf).max(-2).values
        return torch.where(mask.any(-2), found, 0.0)
    total = torch.where(mask, rows, 0.0).sum(-2)
    return total / mask.sum(-2).clamp(min=1) if mode == "mean" else total


def _empty(*size: Any, **options: Any) -> Tensor:
    made = torch.empty(*size, **options)
    return made if made.requires_grad or options.get("out") is not None else of_each_task(made)


_functions: Any = torch._C._nn  # pyright: ignore[reportAttributeAccessIssue]
_FORMULAS: dict[Any, Callable[..., Tensor]] = {
    torch._weight_norm: _weight_norm,
    torch.empty: _empty,
    F.hardsigmoid: _hardsigmoid,
    _functions.hardsigmoid: _hardsigmoid,
    _functions.hardsigmoid_: lambda x: _hardsigmoid(x, True),
    F.normalize: _normalize,
    Tensor.data.__get__: _data,  # type: ignore[attr-defined]
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
}
