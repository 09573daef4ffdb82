"""What the tasks of a batch make of a net's buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from metahpo.functional.trees import Params


def merged_buffers(values: Params) -> Params:
    """One value for each buffer from those that the tasks left, [T, ...] by name, in their order.

    Running statistics (``is_running_average``) become the mean over the tasks. Any other buffer
    takes the value that the last task left, as after a loop over the tasks: a mean of counters,
    flags, unit vectors or codebooks is none of these.
    """
    merged = {}
    for name, value in values.items():
        value = value.detach()
        merged[name] = value[-1]
        if is_running_average(name, value):
            # What no task has changed stays as it is, to the last bit.
            merged[name] = torch.where((value == value[:1]).all(0), value[0], value.mean(0))
    return merged


def is_running_average(name: str, value: Tensor) -> bool:
    """Whether the buffer is a running average over batches, of a type that has means: torch names
    those of its batch and instance norms ``running_mean`` and ``running_var``."""
    if name.rpartition(".")[2] not in ("running_mean", "running_var"):
        return False
    return value.is_floating_point() or value.is_complex()
