"""What ``torch.func`` wraps a tensor in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def under_torch_func() -> bool:
    """Whether this code runs inside ``torch.func.grad``, ``vmap`` or another of its transforms."""
    return torch._C._are_functorch_transforms_active()


def levels(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor, and what each transform that runs now has wrapped in it, from the innermost transform outwards."""
    yield tensor
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
        yield tensor


def batch_size(tensor: Tensor) -> int | None:
    """The size of the dimension over which ``torch.func.vmap`` runs; None where the tensor is the same for all, or
    several ``vmap`` run over it."""
    batched = [level for level in levels(tensor) if functorch.is_batchedtensor(level)]
    if len(batched) != 1:
        return None
    return functorch.get_unwrapped(batched[0]).shape[functorch.maybe_get_bdim(batched[0])]


def of_each_task(tensor: Tensor) -> Tensor:
    """Uninitialised memory such as ``tensor``, under ``torch.func.vmap(randomness="different")`` of each task its own.

    So random numbers can be drawn into it in place, as dropout of whole samples does; else the tensor itself.
    """
    stack = functorch.get_interpreter_stack() or [] if under_torch_func() else []
    vmaps = [functorch.CVmapInterpreterPtr(level) for level in stack if level.key() == functorch.TransformType.Vmap]
    if len(vmaps) != 1 or vmaps[0].randomness() != functorch.RandomnessType.Different:
        return tensor
    with temporarily_clear_interpreter_stack():
        tensor = tensor.new_empty([vmaps[0].batchSize(), *tensor.shape])
    for level in stack:
        if level.key() == functorch.TransformType.Vmap:
            tensor = functorch._add_batch_dim(tensor, 0, level.level())
        else:
            tensor = functorch._wrap_for_grad(tensor, level.level())
    return tensor
