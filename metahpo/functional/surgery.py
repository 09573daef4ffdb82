"""Copies of a net with a layer more, or without its head."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from metahpo.errors import NetError, did_you_mean
from metahpo.functional.copies import copied


def with_layers(net: nn.Module, after: Iterable[str], layer: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A copy of ``net`` in which each named module is followed by ``layer(module)``, both in an ``nn.Sequential``."""
    net = copy.deepcopy(net)
    for name in after:
        parent, child = _find(net, name)
        old = getattr(parent, child)
        setattr(parent, child, nn.Sequential(old, layer(old)))
    return net


def without_head(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A copy of ``net`` that gives what its head is given, and the head: its last layer with parameters, in the order
    in which it registers its layers."""
    layers = [name for name, module in net.named_modules() if name and any(True for _ in module.parameters(False))]
    if len(layers) < 2:
        raise NetError(f"{type(net).__name__} has no layers before its head; expected a net of at least two")
    net = copy.deepcopy(net)
    parent, child = _find(net, layers[-1])
    head = getattr(parent, child)
    setattr(parent, child, nn.Identity())
    return net, head


def _find(net: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the named one, and its name there."""
    known = [known for known, _ in net.named_modules() if known]
    if name not in known:
        raise NetError(f"{type(net).__name__} has no layer {name!r}; {did_you_mean(name, known)}")
    parent, _, child = name.rpartition(".")
    return net.get_submodule(parent), child
