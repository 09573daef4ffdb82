"""Copies of a net with a layer more, or without its head."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from metahpo.errors import NetError, did_you_mean
from metahpo.functional.copies import copied


class Followed(nn.Sequential):
    """A layer and one that follows it, with the first one's attributes.

    Attention, as torchvision writes it, reads the weights of its layers and never calls them; there nothing follows.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            layer = self.__dict__.get("_modules", {}).get("0")
            if layer is None or name.startswith("_"):
                raise
            return getattr(layer, name)


def with_layers(
    net: nn.Module,
    after: Iterable[str],
    layer: Callable[[nn.Module], nn.Module],
    kind: type[Followed] = Followed,
) -> nn.Module:
    """A copy of ``net`` in which each named module is followed by ``layer(module)``, both in a module ``kind``."""
    net = copied(net)
    for old in [_find(net, name) for name in after]:
        _replace(net, old, kind(old, layer(old)))
    return net


def is_called(layer: nn.Module) -> bool:
    """False for the last layer of torch's attention, of which it reads the weights alone."""
    return not isinstance(layer, NonDynamicallyQuantizableLinear)


def without_head(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A copy of ``net`` that gives what its head is given, and the head: its last layer with parameters, in the order
    in which it registers its layers."""
    net = copied(net)
    layers = [module for name, module in net.named_modules() if name and any(True for _ in module.parameters(False))]
    if len(layers) < 2:
        raise NetError(f"{type(net).__name__} has no layers before its head; expected a net of at least two")
    _replace(net, layers[-1], nn.Identity())
    return net, layers[-1]


def like(new: nn.Module, old: nn.Module) -> nn.Module:
    """``new`` with parameters of the type of those of ``old``, if any."""
    first = next((p for p in old.parameters() if p.is_floating_point()), None)
    return new if first is None else new.to(first.dtype)


def _replace(net: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts ``new`` wherever ``old`` is registered, be it under several names."""
    kept = set(new.modules())
    for parent in list(net.modules()):
        for name, child in parent._modules.items():
            if child is old and parent not in kept:
                parent._modules[name] = new


def _find(net: nn.Module, name: str) -> nn.Module:
    known = dict(net.named_modules(remove_duplicate=False))
    if not name or name not in known:
        raise NetError(f"{type(net).__name__} has no layer {name!r}; {did_you_mean(name, filter(None, known))}")
    return known[name]
