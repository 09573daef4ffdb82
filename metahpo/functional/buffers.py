"""What the tasks of a batch make of a net's buffers."""

from __future__ import annotations

from torch import Tensor

from metahpo.functional.trees import Params


def merged_buffers(values: Params) -> Params:
    """One value for each buffer from those that the tasks left, [T, ...] by name, in their order.

    Running statistics (``is_running_average``) become the mean over the tasks. Any other buffer
    takes the value that the last task left, as after a loop over the tasks: a mean of counters,
    flags, unit vectors or codebooks is none of these.
    """
    return {
        name: value.detach().mean(0) if is_running_average(name, value) else value.detach()[-1]
        for name, value in values.items()
    }


def is_running_average(name: str, value: Tensor) -> bool:
    """Whether the buffer is a running average over batches, of a type that has means: torch names
    those of its batch and instance norms ``running_mean`` and ``running_var``."""
    if name.rpartition(".")[2] not in ("running_mean", "running_var"):
        return False
    return value.is_floating_point() or value.is_complex()
