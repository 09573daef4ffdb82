"""Choosing kernels that can be differentiated twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def twice_differentiable(net: nn.Module) -> Iterator[None]:
    """Inside it ``net`` runs on kernels that have a double backward.

    The fused attention kernels have none, so attention runs on the plain (MATH) one; cuDNN's recurrent nets have none
    either, so cuDNN is off while a net that holds one runs.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in net.modules())
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext(),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
