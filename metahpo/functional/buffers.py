"""A net's buffers: what the tasks of a batch make of them, those that a state dict leaves out, copies to write into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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


def whole_state(module: nn.Module) -> dict[str, Any]:
    """The state dict, with the buffers that it leaves out (``persistent=False``) under their names: a training moves
    them too."""
    return {**module.state_dict(), **_left_out(module)}


@torch.no_grad()
def load_whole_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Takes over a ``whole_state``. Buffers that a state dict leaves out stay where the state does not have them."""
    others = _left_out(module)
    module.load_state_dict({name: value for name, value in state.items() if name not in others})
    for name, buffer in others.items():
        if name in state:
            buffer.copy_(state[name])


def optional_state(module: nn.Module) -> set[str]:
    """The names in ``whole_state`` that a state may lack."""
    names = {f"{path}.{key}" for path, m in module.named_modules() for key in getattr(m, "optional_state", ())}
    return names | set(_left_out(module))


def _left_out(module: nn.Module) -> Params:
    return {
        f"{path}.{name}".lstrip("."): buffer
        for path, part in module.named_modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and name in part._non_persistent_buffers_set
    }


@contextmanager
def copied_buffers(module: nn.Module) -> Iterator[None]:
    """Inside it the module has copies of its buffers: what it writes into them is dropped."""
    copies: dict[int, Tensor] = {}
    places = [(m._buffers, name, b) for m in module.modules() for name, b in m._buffers.items() if b is not None]
    for buffers, name, buffer in places:
        buffers[name] = copies.setdefault(id(buffer), buffer.clone())
    try:
        yield
    finally:
        for buffers, name, buffer in places:
            buffers[name] = buffer
