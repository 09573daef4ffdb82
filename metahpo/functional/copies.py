"""Copies of nets, whatever they keep and whatever they are wrapped in."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.overrides import TorchFunctionMode

from metahpo.errors import NetError, one_line
from metahpo.functional.levels import levels
from metahpo.functional.trees import Params
from metahpo.functional.turns import TURN

M = TypeVar("M", bound=nn.Module)


@TURN
def copied(module: M, memo: dict[int, Any] | None = None) -> M:
    """A deep copy, without what ``torch.compile``, DataParallel and DDP wrap around it or its parts.

    Tensors that a forward pass left behind (``self.attention = ...``), of which ``copy.deepcopy``
    takes none, are copied without their history.

    Args:
        module: a net or a learner; it stays as it is.
        memo: that of ``copy.deepcopy``: the copies there are already, by ``id``.

    Raises:
        NetError: for a module that keeps what cannot be copied (a lock, an open file).
    """
    memo = {} if memo is None else memo
    try:
        with _WithoutHistory():
            for part in reversed(list(module.modules())):
                if (inner := _inner(part)) is not part:
                    memo[id(part)] = copy.deepcopy(inner, memo)
            return copy.deepcopy(module, memo)
    except TypeError as error:
        raise NetError(f"{type(module).__name__} cannot be copied: {one_line(error)}") from error


def unwrapped(net: nn.Module) -> nn.Module:
    """The net itself, or a copy without wrappers where it or a part of it has one."""
    return copied(net) if any(_inner(part) is not part for part in net.modules()) else net


def trainable(net: nn.Module) -> Params:
    """The net's own trainable parameters by the names that they have in ``copied(net)``."""
    found: dict[int, tuple[str, Tensor]] = {}
    for path, part in _parts(net, "", set()):
        for key, p in part._parameters.items():
            if p is not None and p.requires_grad:
                found.setdefault(id(p), (f"{path}{key}", p))
    return dict(found.values())


def tensors_of(net: nn.Module) -> Params:
    """The net's parameters and buffers, kept by ``state_dict`` or not, by every name that they have."""
    return dict([*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)])


@torch.no_grad()
def take_over(net: nn.Module, tensors: Params) -> None:
    """Gives the net's tensors these values, by name, whatever its own ``load_state_dict`` does.

    Raises:
        NetError: for a name that the net does not have, or another shape; nothing is changed then.
    """
    own = tensors_of(net)
    for name, value in tensors.items():
        if name not in own or own[name].shape != value.shape:
            found = list(own[name].shape) if name in own else "no such tensor"
            raise NetError(f"{type(net).__name__}: {name}: found {found}, expected {list(value.shape)}")
    for name, value in tensors.items():
        own[name].copy_(value)


def _parts(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    module = _inner(module)
    if id(module) not in seen:
        seen.add(id(module))
        yield path, module
        for key, child in module._modules.items():
            if child is not None:
                yield from _parts(child, f"{path}{key}.", seen)


def _inner(module: nn.Module) -> nn.Module:
    """What is wrapped, or the module itself."""
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        return _inner(module.module)
    # By its name: its own file takes a second to import.
    if type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules:
        return _inner(module._modules["_orig_mod"])  # type: ignore[arg-type]
    return module


class _WithoutHistory(TorchFunctionMode):
    """Copies a tensor that was computed as a leaf which requires grad if the tensor did.

    Should the net compute with the copy, its first call finds it as a tensor that nobody gave.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        *_, value = levels(tensor)
        if id(tensor) not in memo:
            memo[id(tensor)] = value.detach().clone().requires_grad_(value.requires_grad)
        return memo[id(tensor)]
