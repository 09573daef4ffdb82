"""Copies of a net with layers more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from metahpo.errors import NetError, did_you_mean
from metahpo.functional.copies import copied

# The child that follows a layer, by the name that it had when both were put into an nn.Sequential.
_FOLLOWER = "1"


def with_layers(net: nn.Module, after: Iterable[str], layer: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A copy of ``net`` in which ``layer(module)`` is given what each named module gives, at every call.

    The module stays where and what it is, for nets that read its attributes; the new layer is a child of it, which a
    forward hook calls.
    """
    net = copied(net)
    for old in [_find(net, name) for name in after]:
        _follow(old, layer(old))
    return net


def is_called(layer: nn.Module) -> bool:
    """False for the last layer of torch's attention, of which it reads the weights alone."""
    return not isinstance(layer, NonDynamicallyQuantizableLinear)


def like(new: nn.Module, old: nn.Module) -> nn.Module:
    """``new`` with parameters of the type of those of ``old``, if any."""
    first = next((p for p in old.parameters() if p.is_floating_point()), None)
    return new if first is None else new.to(first.dtype)


def current_names(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict by the names of ``module.state_dict()``.

    Where a layer of ``with_layers`` was put into an ``nn.Sequential`` with its follower, as the version before did, the
    names of the layer's own tensors have a "0." more.
    """
    renamed: dict[str, str] = {}
    for path, layer in module.named_modules(remove_duplicate=False):
        if (follower := getattr(layer, "follower", None)) is None:
            continue
        for name in layer.state_dict():
            start, _, rest = name.partition(".")
            before = f"{path}.1.{rest}" if start == follower else f"{path}.0.{name}"
            if f"{path}.{name}" not in state and before in state:
                renamed[before] = f"{path}.{name}"
    return {renamed.get(name, name): value for name, value in state.items()}


def _follow(layer: Any, new: nn.Module) -> None:
    name = _FOLLOWER
    while name in layer._modules:
        name = str(int(name) + 1)
    layer.add_module(name, new)
    layer.follower = name
    # A plain sequence runs its last child as it runs all.
    if not (isinstance(layer, nn.Sequential) and type(layer).forward is nn.Sequential.forward):
        layer.register_forward_hook(followed)


def followed(layer: nn.Module, inputs: Any, output: Any) -> Any:
    """The forward hook of a layer of ``with_layers``."""
    return layer._modules[layer.follower](output)  # type: ignore[misc,index]


def _find(net: nn.Module, name: str) -> nn.Module:
    known = dict(net.named_modules(remove_duplicate=False))
    if not name or name not in known:
        raise NetError(f"{type(net).__name__} has no layer {name!r}; {did_you_mean(name, filter(None, known))}")
    return known[name]
