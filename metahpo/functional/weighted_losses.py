"""Formulas for torch's losses with weights, in which its kernels have no derivative."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[..., Tensor] | None:
    """The formula that stands for a loss called with weights of classes or examples; None for any other call."""
    formula, places = _FORMULAS.get(function, (None, {}))
    for name, place in places.items():
        if (args[place] if place < len(args) else kwargs.get(name)) is not None:
            return formula
    return None


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    classes = 1 if input.dim() > 1 else 0
    logs = F.log_softmax(input, classes)
    if target.is_floating_point():
        return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    return _nll_loss(logs, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)


def _nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    classes = 1 if input.dim() > 1 else 0
    counted = target != ignore_index
    labels = torch.where(counted, target, 0)
    its = torch.where(counted, weight[labels], 0.0)
    losses = -its * input.gather(classes, labels.unsqueeze(classes)).squeeze(classes)
    if label_smoothing:
        each = weight.view(-1, *[1] * (input.dim() - classes - 1)) * input
        smooth = torch.where(counted, -each.sum(classes), 0.0) / input.shape[classes]
        losses = (1 - label_smoothing) * losses + label_smoothing * smooth
    how = _reduction(size_average, reduce, reduction)
    return losses.sum() / its.sum() if how == "mean" else _reduced(losses, how)


def _binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    positive = 1 if pos_weight is None else 1 + (pos_weight - 1) * target
    losses = (1 - target) * input - positive * F.logsigmoid(input)
    losses = losses if weight is None else weight * losses
    return _reduced(losses, _reduction(size_average, reduce, reduction))


def _binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    losses = weight * F.binary_cross_entropy(input, target, reduction="none")
    return _reduced(losses, _reduction(size_average, reduce, reduction))


def _multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    labels = target.unsqueeze(-1)
    gaps = (margin - input.gather(-1, labels) + input).clamp(min=0) ** p
    others = torch.arange(input.shape[-1], device=input.device) != labels
    losses = torch.where(others, gaps, 0.0).mean(-1)
    losses = losses if weight is None else weight[target] * losses
    return _reduced(losses, _reduction(size_average, reduce, reduction))


def _reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    if size_average is None and reduce is None:
        return reduction
    return "none" if reduce is False else "sum" if size_average is False else "mean"


def _reduced(losses: Tensor, how: str) -> Tensor:
    return losses.mean() if how == "mean" else losses.sum() if how == "sum" else losses


def _with_places(formula: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], dict[str, int]]:
    """The formula, and the places among its arguments of those without a derivative in torch's kernel."""
    names = list(inspect.signature(formula).parameters)
    return formula, {name: names.index(name) for name in ("weight", "pos_weight") if name in names}


_FORMULAS = {
    F.cross_entropy: _with_places(_cross_entropy),
    F.nll_loss: _with_places(_nll_loss),
    F.binary_cross_entropy_with_logits: _with_places(_binary_cross_entropy_with_logits),
    F.binary_cross_entropy: _with_places(_binary_cross_entropy),
    F.multi_margin_loss: _with_places(_multi_margin_loss),
}
