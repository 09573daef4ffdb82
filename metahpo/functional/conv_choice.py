"""Which way to run a convolution under ``torch.func.vmap``, by measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from metahpo.functional.batched_conv import WAYS, BatchedConvolutions, Layer
from metahpo.functional.levels import under_torch_func

_fastest: dict[tuple[str, Layer], str] = {}
_RUNS = 3
_GAIN = 0.95  # Another way than torch's own is taken if it needs at most this share of its time.
_COLUMNS_AT_MOST = 1 / 64  # Columns of one layer in device memory; those of every layer and step are kept.


def batched_convolutions(inputs: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Inside it a ``conv2d`` under ``vmap`` runs in the way that ``measured`` finds for its layer; inputs: of the net.

    Changed are those whose input and weight both differ from task to task, of one group, on CUDA. While the tasks still
    share a weight, torch itself folds them into the batch of one convolution. On the CPU all stays as it is and no
    timing enters the results: there no other way was reliably faster than the grouped one at the layers of Conv4.
    """
    # What a compiler records at this moment was chosen before or not at all.
    here = under_torch_func() and not torch.compiler.is_compiling()
    if not (here and inputs and getattr(inputs[0], "is_cuda", False)):
        return nullcontext()
    device = inputs[0].device
    return BatchedConvolutions(lambda layer: measured(layer, device))


def measured(layer: Layer, device: torch.device) -> str:
    """The way that takes ``device`` the least time for ``layer``, forward, backward and double backward.

    Each way is timed on random tensors when a layer is first met in this process. The differences between ways are
    roundings, but they let the last digits vary from run to run. Where columns would take too much memory they are out.
    """
    key = (torch.cuda.get_device_name(device) if device.type == "cuda" else device.type, layer)
    if key not in _fastest:
        if torch._C._current_graph_task_id() != -1:
            # Inside a backward pass: a timing would wait for autograd's thread of this device, which waits for us.
            return "grouped"
        # A thread of its own has none of the transforms, modes and autocast that are at work here.
        with ThreadPoolExecutor(1) as fresh:
            _fastest[key] = fresh.submit(_measure, layer, device).result()
    return _fastest[key]


def _measure(layer: Layer, device: torch.device) -> str:
    ways = dict(WAYS)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if layer.column_bytes() > _COLUMNS_AT_MOST * torch.cuda.get_device_properties(device).total_memory:
            del ways["columns"]
    seconds = {name: _seconds(way, layer, device) for name, way in ways.items()}
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[best] <= _GAIN * seconds["grouped"] else "grouped"


def _seconds(way: Callable[..., Tensor], layer: Layer, device: torch.device) -> float:
    """The device's shortest time for one pass and its two gradients; infinite where it cannot run them."""
    wanted = (0, 1) if layer.for_x else (1,)

    def inner(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return way(layer, x, weight, bias).square().sum()

    def outer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.stack([g.square().sum() for g in grad(inner, wanted)(x, weight, bias)]).sum()

    draw = partial(torch.randn, generator=torch.Generator(device), dtype=layer.dtype, device=device)
    tensors = (
        draw((layer.tasks, *layer.x)),
        draw((layer.tasks, *layer.weight)),
        draw((layer.tasks, layer.weight[0])) if layer.bias else None,
    )
    both = vmap(grad(outer, wanted), in_dims=(0, 0, 0 if layer.bias else None))
    try:
        both(*tensors)
        return min(_time(lambda: both(*tensors), device) for _ in range(_RUNS))
    except RuntimeError:  # No memory, or no kernel, for this way.
        return float("inf")


def _time(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The device waits first, for some 10 ms, while the host runs ahead: a replayed CUDA graph does not wait for it.
    torch.cuda._sleep(20_000_000)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000
