"""Calling a module with other tensors than its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from metahpo.errors import NetError, did_you_mean
from metahpo.functional.trees import Params


def call_with(module: nn.Module, tensors: Params, arguments: tuple[Any, ...]) -> Any:
    """``module(*arguments)`` with other parameters and buffers, by name, in place of its own.

    As ``torch.func.functional_call``, but each attribute of each module is changed once and put back
    once, however many names the module is registered under: changed once for each name, it would be
    left with the tensors given. A tensor that stands in several places is the given one in all.

    Args:
        module: the module; it has its own tensors again afterwards.
        tensors: by dotted name, any of the names of a tensor. Where the module replaces one during
            the call (running statistics), the new one is put into this dict.
        arguments: of the module's ``forward``.

    Returns:
        What the module returns.

    Raises:
        NetError: for a name that the module does not have, or two tensors for what is one.
    """
    places, given = {}, {}
    for path, part in module.named_modules(remove_duplicate=False):
        for kind in ("_parameters", "_buffers"):
            attributes = getattr(part, kind)
            for key, old in attributes.items():
                if old is None:
                    continue
                places[id(part), key] = attributes, key, old
                name = f"{path}.{key}" if path else key
                if name in tensors:
                    names, new = given.setdefault(id(old), ([], tensors[name]))
                    names.append(name)
                    if new is not tensors[name]:
                        raise NetError(f"{names[0]!r} and {name!r} are one tensor and were given two")
    known = {name for names, _ in given.values() for name in names}
    if len(known) != len(tensors):
        unknown = next(name for name in tensors if name not in known)
        own = [n for n, _ in [*module.named_parameters(), *module.named_buffers()]]
        raise NetError(f"{type(module).__name__} has no {unknown!r}; {did_you_mean(unknown, own)}")
    swapped = [place for place in places.values() if id(place[2]) in given]
    for attributes, key, old in swapped:
        attributes[key] = given[id(old)][1]
    try:
        return module(*arguments)
    finally:
        for attributes, key, old in swapped:
            names, own = given[id(old)]
            new = attributes.get(key)
            if new is not own and isinstance(new, Tensor):
                tensors.update(dict.fromkeys(names, new))
            attributes[key] = old
