"""The windows of a convolution as columns of a matrix (im2col), and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

Pair = tuple[int, int]


def unfold(x: Tensor, size: Pair, stride: Pair, dilation: Pair) -> Tensor:
    """The windows of all images [..., N, C, H, W] as columns, [..., C * KH * KW, N * OH * OW].

    Differentiable any number of times, in forward mode too, and under ``vmap``.
    """
    return _Unfold.apply(x, (size, stride, dilation))  # type: ignore[no-any-return]


# torch's unfold launches a kernel for each image of a batch on CUDA, and the gradient of a tensor's windows
# (Tensor.unfold) has no rule for vmap: so both linear maps are defined here, each the other's gradient.


class _Unfold(Function):
    @staticmethod
    def forward(x: Tensor, window: tuple[Pair, Pair, Pair]) -> Tensor:
        (kh, kw), (sh, sw), (dh, dw) = window
        # [..., N, C, OH, OW, KH, KW], a view.
        windows = x.unfold(-2, dh * (kh - 1) + 1, sh).unfold(-2, dw * (kw - 1) + 1, sw)[..., ::dh, ::dw]
        columns = windows.movedim((-5, -2, -1), (-6, -5, -4))
        return columns.reshape(*x.shape[:-4], x.shape[-3] * kh * kw, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.shape, ctx.window = inputs[0].shape[-4:], inputs[1]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor):  # type: ignore[override]
        return _Fold.apply(cotangent, ctx.shape, ctx.window), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None):  # type: ignore[override]
        return _Unfold.apply(tangent, ctx.window)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, window: Any):  # type: ignore[override]
        return _Unfold.apply(x.movedim(in_dims[0], 0), window), 0


class _Fold(Function):
    """The columns of ``_Unfold`` added up where their windows lay: [..., N, C, H, W], of whose last four is shape."""

    @staticmethod
    def forward(columns: Tensor, shape: torch.Size, window: tuple[Pair, Pair, Pair]) -> Tensor:
        size, stride, dilation = window
        lead, images = columns.shape[:-2], columns.unflatten(-1, (shape[0], -1)).movedim(-2, -3)
        folded = F.fold(images.flatten(0, -3), shape[2:], size, dilation, 0, stride)  # type: ignore[arg-type]
        return folded.view(*lead, *shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.shape, ctx.window = inputs

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor):  # type: ignore[override]
        return _Unfold.apply(cotangent, ctx.window), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None):  # type: ignore[override]
        return _Fold.apply(tangent, ctx.shape, ctx.window)

    @staticmethod
    def vmap(info: Any, in_dims: Any, columns: Tensor, shape: Any, window: Any):  # type: ignore[override]
        return _Fold.apply(columns.movedim(in_dims[0], 0), shape, window), 0
