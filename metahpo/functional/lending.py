"""Giving functions data that they may write into, or take apart, without harm to what is used again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from metahpo.errors import NetError
from metahpo.functional.levels import under_torch_func
from metahpo.functional.writes import versions


def kept(batch: Any) -> Any:
    """A copy of a batch of any kind, to keep where its loader may fill the same memory again."""
    if type(batch) in (tuple, list) and all(isinstance(part, Tensor) for part in batch):
        return type(batch)(part.clone() for part in batch)  # As below, in a fraction of the time.
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf), batch)


class Lender:
    """Lends a function trees of tensors: in containers of their own where these can be changed, and as copies if its
    first calls, which get copies, show that it writes into them.

    name: of the function, for the message.
    """

    def __init__(self, name: str):
        self.name = name
        self.looks, self.writes = 2, False

    def lend(self, tree: Any) -> tuple[Any, Callable[[], None]]:
        """What to give the function, and what to call after it.

        The second raises NetError for a function that wrote into what it got, but did not at its first calls.
        """
        if torch.compiler.is_compiling():
            return tree, lambda: None
        if self.looks or self.writes:
            given = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)
            copies = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
            return given, lambda: self._learn(tree, copies)
        if isinstance(tree, tuple) and all(isinstance(part, Tensor) for part in tree):
            given, tensors = tree, tree
        else:
            given = tree_map(lambda leaf: leaf, tree)
            tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        before = versions(tensors)

        def check() -> None:
            if versions(tensors) != before:
                raise NetError(
                    f"{self.name} wrote into the data that it was given, not at its first calls but at a later one; "
                    "other steps would see what it wrote: let it copy them first"
                )

        return given, check

    def _learn(self, tree: Any, copies: list[Tensor]) -> None:
        """Looks at what became of the copies."""
        if self.writes:
            return
        self.looks -= 1
        originals = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
        self.writes = any(versions(copies)) or not _alike(originals, copies)


class Lent:
    """A function that is lent its argument number ``place``."""

    def __init__(self, function: Callable[..., Any], place: int, name: str):
        self.function, self.place, self.lender = function, place, Lender(name)

    def __call__(self, *arguments: Any) -> Any:
        given, check = self.lender.lend(arguments[self.place])
        result = self.function(*arguments[: self.place], given, *arguments[self.place + 1 :])
        check()
        return result


def _alike(originals: list[Tensor], copies: list[Tensor]) -> bool:
    """Whether the numbers are the same, where they can be looked at: torch does not count what is written through
    ``data`` or NumPy. A NaN makes them differ, which costs copies and no more."""
    if under_torch_func() or any(t.device.type != "cpu" or type(t) not in (Tensor, torch.nn.Parameter) for t in copies):
        return True
    return all(torch.equal(a, b) for a, b in zip(originals, copies))
