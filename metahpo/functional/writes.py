"""Refusing nets that change their own weights when they run."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from metahpo.errors import NetError
from metahpo.functional.levels import levels, under_torch_func


@contextmanager
def refuse_writes(net: nn.Module, params: Mapping[str, Tensor]) -> Iterator[None]:
    """Raises NetError before the code inside writes into one of ``params`` or of the net's own
    parameters, and after it filled a buffer of the net that was None.

    Operations are seen below autograd and ``torch.func``, so that what is written under
    ``no_grad``, through ``.data`` or into a view is seen too.
    """
    tensors = [*net.named_parameters(), *params.items()]
    storages = {_storage(tensor): name for name, tensor in tensors}
    empty = [
        (name, module, key)
        for name, module in net.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is None
    ]
    with _Watch(net, storages):
        yield
    for name, module, key in empty:
        if module._buffers[key] is not None:
            module._buffers[key] = None
            raise NetError(
                f"{type(net).__name__} fills its buffer {f'{name}.{key}'.lstrip('.')!r}, which was "
                "None, when it runs; register it with a tensor of its shape"
            )


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often each tensor was written into, by torch's count; it costs no look at the tensors' values."""
    try:
        if under_torch_func():  # The count is that of the innermost tensor.
            return [innermost._version for tensor in tensors for *_, innermost in [levels(tensor)]]
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # Those made in inference mode have no count.
        return []


def later_write(net: nn.Module, params: Mapping[str, Tensor], before: list[int]) -> NetError:
    """What to raise where ``versions`` of ``params`` and the net's own parameters differ from those before a call."""
    tensors = [*params.items(), *net.named_parameters()]
    now = versions(tensor for _, tensor in tensors)
    name = next((name for (name, _), old, new in zip(tensors, before, now) if old != new), "")
    return NetError(
        f"{type(net).__name__} wrote into its parameter {name!r} when it ran, not at its first calls but at a later "
        "one, which changed the weights that it was given; write into buffers alone"
    )


class _Watch(TorchDispatchMode):
    def __init__(self, net: nn.Module, storages: dict[int, str]):
        super().__init__()
        self.net, self.storages = net, storages

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for place, name in _written(func):
            tensor: Any = args[place] if place < len(args) else kwargs.get(name)
            for each in tensor if isinstance(tensor, (list, tuple)) else [tensor]:
                found = self.storages.get(_storage(each)) if isinstance(each, Tensor) else None
                if found is not None:
                    raise NetError(
                        f"{type(self.net).__name__} writes into its parameter {found!r} when it runs "
                        f"({func}), which would change the initial weights; write into buffers "
                        "alone, and give Embedding no max_norm"
                    )
        return func(*args, **kwargs)


@functools.cache
def _written(operation: Any) -> list[tuple[int, str]]:
    """The arguments that an operation writes into: their places and names."""
    arguments = enumerate(operation._schema.arguments)
    return [(place, a.name) for place, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _storage(tensor: Tensor) -> int:
    *_, innermost = levels(tensor)
    return innermost.untyped_storage()._cdata
