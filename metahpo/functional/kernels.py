"""Choosing kernels that can be differentiated twice."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

_cuda = torch.backends.cuda
_ATTENTION_KERNELS = (
    (False, _cuda.flash_sdp_enabled, _cuda.enable_flash_sdp),
    (False, _cuda.mem_efficient_sdp_enabled, _cuda.enable_mem_efficient_sdp),
    (False, _cuda.cudnn_sdp_enabled, _cuda.enable_cudnn_sdp),
    (True, _cuda.math_sdp_enabled, _cuda.enable_math_sdp),
)
_entered = threading.Lock()
_depth = {"attention": 0, "recurrent": 0}
_stacks: dict[str, contextlib.ExitStack] = {}
# torch counts the nesting of dual levels for the process, not for the thread.
_one_dual_level = threading.RLock()
_here = threading.local()


def is_recurrent(net: nn.Module) -> bool:
    """Whether a recurrent layer of torch's is in ``net``."""
    return any(isinstance(module, nn.RNNBase) for module in net.modules())


@contextlib.contextmanager
def twice_differentiable(recurrent: bool) -> Iterator[None]:
    """Inside it nets run on kernels that have a double backward.

    The fused attention kernels have none, so attention runs on the plain (MATH) one; cuDNN's recurrent nets have none
    either, so cuDNN is off while a net that holds one runs (``recurrent``).
    """
    kinds = ["attention", "recurrent"] if recurrent else ["attention"]
    for kind in kinds:
        _enter(kind)
    try:
        yield
    finally:
        for kind in kinds:
            _leave(kind)


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Inside it this thread, and no other, may enter dual levels (``torch.func.jvp``, ``forward_ad.dual_level``)."""
    with _one_dual_level:
        _load_decompositions()
        before = getattr(_here, "forward_mode", False)
        _here.forward_mode = True
        try:
            yield
        finally:
            _here.forward_mode = before


@contextlib.contextmanager
def constants_without_tangents() -> Iterator[None]:
    """Inside it what is computed under ``torch.no_grad`` is a constant to forward mode too.

    Running statistics that a net updates so before it normalises with them would otherwise be constants to the first
    derivative and none to the second.
    """
    # Gradients on, so that the code inside alone can turn them off.
    with torch.enable_grad(), _Constants():
        yield


class _Constants(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(args[0])
        return result


@functools.cache
def _load_decompositions() -> None:
    """Loads what torch loads at the first dual number, without torch's warning of its own use of TorchScript."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        getattr(forward_ad, "_maybe_load_decompositions", lambda: None)()


def in_forward_mode(*tensors: Tensor | None) -> bool:
    """Whether this thread is inside ``forward_mode``, or a tensor given has a tangent.

    A dual level alone says nothing: it may be another thread's.
    """
    if getattr(_here, "forward_mode", False):
        return True
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


# The choices are torch's globals: with several threads inside, the first makes them and the last takes them back.


def _enter(kind: str) -> None:
    with _entered:
        _depth[kind] += 1
        if _depth[kind] == 1:
            stack = contextlib.ExitStack()
            if kind == "attention":
                fast = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
                stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
                # Not torch.nn.attention.sdpa_kernel, which has to be left by the thread that entered it.
                for wanted, is_on, switch in _ATTENTION_KERNELS:
                    stack.callback(switch, is_on())
                    switch(wanted)
            else:
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            _stacks[kind] = stack


def _leave(kind: str) -> None:
    with _entered:
        _depth[kind] -= 1
        if _depth[kind] == 0:
            _stacks.pop(kind).close()
