"""The C kernels as functions that can be differentiated twice.

Each gradient is itself a ``torch.autograd.Function`` with a gradient; a third derivative is refused. Images are
[N, C, H, W], best in channels-last memory, which is what comes out.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from metahpo.errors import NetError
from metahpo.native.build import library


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolution of [N, C, H, W] with [O, C, K, K] (K odd), stride 1, zero padding K // 2: [N, O, H, W]."""
    _, inputs, size, _ = weight.shape
    if x.dim() != 4 or x.shape[1] != inputs or x.numel() == 0 or weight.shape[3] != size or size % 2 == 0:
        raise ValueError(f"conv2d does not fit: images {tuple(x.shape)}, weight {tuple(weight.shape)}")
    if x.dtype != weight.dtype or (bias is not None and x.dtype != bias.dtype):
        raise TypeError(f"conv2d needs one type, got images {x.dtype} and weight {weight.dtype}")
    return _Conv.apply(x, weight, bias)  # type: ignore[no-any-return]


def norm_act_pool(
    y: Tensor, scale: Tensor, shift: Tensor, *, eps: float, slope: float, pool: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm by the batch's statistics, leaky ReLU and max pooling of [N, C, H, W].

    scale, shift: [C]; slope: of the activation's negative side (0: ReLU; 1: none); pool: 2, or 1 for none. Returns the
    output [N, C, H // pool, W // pool], and the batch mean and 1 / sqrt(variance + eps), [C], without gradient.
    """
    if y.dim() != 4 or y.numel() == 0 or not scale.shape == shift.shape == y.shape[1:2] or min(y.shape[2:]) < pool:
        raise ValueError(f"norm_act_pool does not fit: images {tuple(y.shape)}, scale {tuple(scale.shape)}")
    if not y.dtype == scale.dtype == shift.dtype:
        raise TypeError(f"norm_act_pool needs one type, got images {y.dtype} and scale {scale.dtype}")
    return _Norm.apply(y, scale, shift, eps, slope, pool)  # type: ignore[no-any-return]


def conv_taps(weight: Tensor) -> Tensor:
    """``weight`` [O, C, K, K] laid out in memory as [K, K, C, O], as the kernels want it."""
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def _last(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """``backward`` as the last derivative there is.

    torch's ``once_differentiable`` will not do: ``autograd.grad`` never visits the node that it leaves to raise.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        with torch.no_grad():
            results = backward(ctx, *cotangents)
        if not torch.is_grad_enabled():
            return results
        found = [r for r in results if r is not None]
        marked = iter(_NoThird.apply(len(found), *found, *cotangents, *ctx.saved_tensors))  # type: ignore[arg-type]
        return tuple(r if r is None else next(marked) for r in results)

    return run


class _NoThird(Function):
    """Hands on its first tensors; their gradient, with respect to any of the rest, is refused."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *_: Any):  # type: ignore[override]
        raise NetError("the CPU kernels have no third derivative; choose engine vmap or loop")


class _Conv(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.has_bias = b is not None
        ctx.save_for_backward(x, w)
        return _conv(x, w, b)

    @staticmethod
    def backward(ctx: Any, gy: Tensor):  # type: ignore[override]
        x, w = ctx.saved_tensors
        return _ConvBackward.apply(gy, x, w, ctx.has_bias, ctx.needs_input_grad[0])


class _ConvBackward(Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, w: Tensor, has_bias: bool, for_x: bool):
        ctx.save_for_backward(gy, x, w)
        ctx.set_materialize_grads(False)
        gw, gb = _conv_weight(x, gy, w.shape, has_bias)
        return _conv(gy, w, None, transposed=True) if for_x else None, gw, gb

    @staticmethod
    @_last
    def backward(ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None):  # type: ignore[override]
        gy, x, w = ctx.saved_tensors
        ggy = gx = gw = None
        if ctx.needs_input_grad[0]:
            if vx is not None:
                ggy = _conv(vx, w, vb)
            if vw is not None:
                ggy = _conv(x, vw, vb if vx is None else None, onto=ggy)
            if ggy is None and vb is not None:
                ggy = vb.view(1, -1, 1, 1).expand_as(gy)
        if vx is not None and ctx.needs_input_grad[2]:
            gw = _conv_weight(vx, gy, w.shape, False)[0]
        if vw is not None and ctx.needs_input_grad[1]:
            gx = _conv(gy, vw, None, transposed=True)
        return ggy, gx, gw, None, None


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, shift: Tensor, eps: float, slope: float, pool: int):
        given = y, scale
        y, scale, shift = _images(y), scale.contiguous(), shift.contiguous()
        n, c, h, w = y.shape
        out = _empty(y, n, c, h // pool, w // pool)
        chosen = torch.empty_like(out) if pool == 2 else y
        code = torch.empty(out.numel(), dtype=torch.uint8)
        mean, rstd = y.new_empty(c), y.new_empty(c)
        _library(y).norm_forward(
            *_pointers(y, scale, shift, chosen, code, out, mean, rstd),
            *_sizes(y),
            pool,
            eps,
            slope,
        )
        # The tensors given are saved, not their rearranged copies, through which no gradient would reach them.
        ctx.save_for_backward(*given, chosen, code, mean, rstd)
        ctx.settings = slope, pool
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return out, mean, rstd

    @staticmethod
    def backward(ctx: Any, go: Tensor | None, *_: Any):  # type: ignore[override]
        if go is None:
            return None, None, None, None, None, None
        return *_NormBackward.apply(go, *ctx.saved_tensors, *ctx.settings), None, None, None


class _NormBackward(Function):
    @staticmethod
    def forward(
        ctx: Any,
        go: Tensor,
        y: Tensor,
        scale: Tensor,
        chosen: Tensor,
        code: Tensor,
        mean: Tensor,
        rstd: Tensor,
        slope: float,
        pool: int,
    ):
        go, y, scale = _images(go), _images(y), scale.contiguous()
        gy, gscale, gshift = torch.empty_like(y), torch.empty_like(scale), torch.empty_like(scale)
        _library(y).norm_backward(
            *_pointers(go, y, scale, chosen, code, mean, rstd, gy, gscale, gshift), *_sizes(y), pool, slope
        )
        ctx.save_for_backward(go, y, scale, chosen, code, mean, rstd, gscale, gshift)
        ctx.settings = slope, pool
        ctx.set_materialize_grads(False)
        return gy, gscale, gshift

    @staticmethod
    @_last
    def backward(ctx: Any, vy: Tensor | None, vscale: Tensor | None, vshift: Tensor | None):  # type: ignore[override]
        go, y, scale, chosen, code, mean, rstd, gscale, gshift = ctx.saved_tensors
        slope, pool = ctx.settings
        vy = torch.zeros_like(y) if vy is None else _images(vy)
        vscale, vshift = (torch.zeros_like(scale) if v is None else v.contiguous() for v in (vscale, vshift))
        ggo, gy, ggamma = torch.empty_like(go), torch.empty_like(y), torch.empty_like(scale)
        _library(y).norm_double(
            *_pointers(vy, vscale, vshift, go, y, scale, chosen, code, mean, rstd, gshift, gscale, ggo, gy, ggamma),
            *_sizes(y),
            pool,
            slope,
        )
        return ggo, gy, ggamma, None, None, None, None, None, None


# Calls of the kernels.


def _conv(x: Tensor, w: Tensor, b: Tensor | None, *, transposed: bool = False, onto: Tensor | None = None) -> Tensor:
    x, taps, b = _images(x), _taps(w), b if b is None else b.contiguous()
    outputs, inputs = (w.shape[1], w.shape[0]) if transposed else w.shape[:2]
    y = onto if onto is not None else _empty(x, x.shape[0], outputs, x.shape[2], x.shape[3])
    n, _, height, width = x.shape
    failed = _library(x).conv(
        *_pointers(x, taps, b, y), n, height, width, inputs, outputs, w.shape[-1], transposed, onto is not None
    )
    return _checked(y, failed)


def _conv_weight(x: Tensor, gy: Tensor, shape: torch.Size, has_bias: bool) -> tuple[Tensor, Tensor | None]:
    x, gy = _images(x), _images(gy)
    outputs, inputs, size, _ = shape
    gw = x.new_empty_strided(shape, (1, outputs, size * inputs * outputs, inputs * outputs))
    gb = x.new_empty(outputs) if has_bias else None
    n, _, height, width = x.shape
    failed = _library(x).conv_weight(*_pointers(x, gy, gw, gb), n, height, width, inputs, outputs, size)
    return _checked(gw, failed), gb


def _checked(result: Tensor, failed: int) -> Tensor:
    if failed:
        raise MemoryError("the CPU kernels could not get working memory")
    return result


def _library(x: Tensor) -> ctypes.CDLL:
    found = library(x.dtype)
    if found is None:
        raise RuntimeError(f"there are no CPU kernels for {x.dtype} here")
    return found


def _images(x: Tensor) -> Tensor:
    if x.stride(1) == 1 and x.shape[1] > 1 and x.shape[2] > 1 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    # Not contiguous(memory_format=channels_last): torch calls [N, 1, H, W] and [N, C, 1, 1] channels-last as they are,
    # whatever their strides.
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _taps(w: Tensor) -> Tensor:
    return w.permute(2, 3, 1, 0).contiguous()


def _empty(like: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    # Not a permuted tensor: autograd lets no view that a Function returns be changed in place, as layers may.
    return like.new_empty_strided((n, c, h, w), (h * w * c, 1, w * c, c))


def _sizes(y: Tensor) -> tuple[Any, ...]:
    n, c, h, w = y.shape
    return n, h, w, c


def _pointers(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]
