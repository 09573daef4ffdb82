"""Convolutions under ``torch.func.vmap`` whose weights differ from task to task: the ways to run one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metahpo.functional.levels import batch_size
from metahpo.functional.windows import Pair, unfold


class Layer(NamedTuple):
    """A convolution as far as its speed depends on it. x: [N, C, H, W] and weight: [O, C, KH, KW] of one task."""

    tasks: int
    x: tuple[int, ...]
    weight: tuple[int, ...]
    bias: bool
    stride: Pair
    padding: tuple[Pair, Pair]
    dilation: Pair
    dtype: torch.dtype
    for_x: bool  # Whether x gets a gradient too.

    def column_bytes(self) -> int:
        return self.tasks * self.x[0] * prod(self.x[2:]) * prod(self.weight[1:]) * self.dtype.itemsize


class BatchedConvolutions(TorchFunctionMode):
    """Runs each ``conv2d`` with per-task weights in the way, one of ``WAYS``, that ``choose`` names for its layer.

    All ways give the same values and derivatives of any order, to rounding. A mode and not new layers, so that nets,
    their hooks and their names stay what they are, and functional calls of ``conv2d`` are seen too.
    """

    def __init__(self, choose: Callable[[Layer], str]):
        super().__init__()
        self.choose = choose

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d:
            return self._conv2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        tasks = batch_size(weight)
        if tasks is None or batch_size(input) is None or input.dim() != 4 or groups != 1:
            return F.conv2d(input, weight, bias, stride, padding, dilation, groups)  # type: ignore[arg-type]
        if torch.is_autocast_enabled(input.device.type):
            lowered = torch.get_autocast_dtype(input.device.type)
            input, weight, bias = (t if t is None else t.to(lowered) for t in (input, weight, bias))  # type: ignore[assignment]
        layer = Layer(
            tasks,
            tuple(input.shape),
            tuple(weight.shape),
            bias is not None,
            _pair(stride),
            _sides(padding, weight.shape[2:], _pair(dilation)),
            _pair(dilation),
            input.dtype,
            input.requires_grad,
        )
        return WAYS[self.choose(layer)](layer, input, weight, bias)


# The ways: x [N, C, H, W], weight [O, C, KH, KW] and bias [O] of one task, seen from inside vmap.


def _grouped(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's own way under vmap: the tasks as groups of one convolution."""
    (top, bottom), (left, right) = layer.padding
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    return F.conv2d(x, weight, bias, layer.stride, (top, left), layer.dilation)


def _channels_last(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same in channels-last memory, in which torch runs a convolution if its weight is laid out so."""
    return _grouped(layer, x, weight.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), bias)


def _columns(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One product of matrices a task: the weight by the windows that it meets, each a column."""
    (top, bottom), (left, right) = layer.padding
    padded = F.pad(x, (left, right, top, bottom))
    size = (weight.shape[2], weight.shape[3])
    height, width = (
        (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(padded.shape[2:], size, layer.stride, layer.dilation)
    )
    out = weight.flatten(1) @ unfold(padded, size, layer.stride, layer.dilation)
    out = out.view(-1, x.shape[0], height, width).transpose(0, 1)
    return out if bias is None else out + bias[:, None, None]


WAYS: dict[str, Callable[[Layer, Tensor, Tensor, Tensor | None], Tensor]] = {
    "grouped": _grouped,
    "columns": _columns,
    "channels_last": _channels_last,
}


def _pair(value: int | Sequence[int]) -> Pair:
    if isinstance(value, int):
        return value, value
    values = tuple(value)
    return values[0], values[-1]


def _sides(padding: int | str | Sequence[int], size: Sequence[int], dilation: Pair) -> tuple[Pair, Pair]:
    """The padding (top, bottom), (left, right) that ``conv2d`` means."""
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(size, dilation)]
        return tuple((n // 2, n - n // 2) for n in totals)  # type: ignore[return-value]
    down, across = (0, 0) if isinstance(padding, str) else _pair(padding)
    return (down, down), (across, across)
