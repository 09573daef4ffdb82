"""Choosing kernels that can be differentiated twice."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_lock = threading.Lock()
_depth = {"attention": 0, "recurrent": 0}
_exits: dict[str, contextlib.ExitStack] = {}


@contextlib.contextmanager
def twice_differentiable(net: nn.Module) -> Iterator[None]:
    """Inside it ``net`` runs on kernels that have a double backward.

    The fused attention kernels have none, so attention runs on the plain (MATH) one; cuDNN's recurrent nets have none
    either, so cuDNN is off while a net that holds one runs. The switches are the process's: threads that overlap share
    them, and the last to leave restores what was there.
    """
    with _shared("attention"):
        if any(isinstance(module, nn.RNNBase) for module in net.modules()):
            with _shared("recurrent"):
                yield
        else:
            yield


@contextlib.contextmanager
def _shared(kind: str) -> Iterator[None]:
    with _lock:
        if _depth[kind] == 0:
            _exits[kind] = contextlib.ExitStack()
            _exits[kind].enter_context(_plain_attention() if kind == "attention" else _no_cudnn())
        _depth[kind] += 1
    try:
        yield
    finally:
        with _lock:
            _depth[kind] -= 1
            if _depth[kind] == 0:
                _exits.pop(kind).close()


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _no_cudnn() -> contextlib.AbstractContextManager[None]:
    return torch.backends.cudnn.flags(enabled=False)
