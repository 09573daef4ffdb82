"""Trees of tensors: the few operations on dicts of tensors by name that the package needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

Params = dict[str, Tensor]


def stack_trees(trees: Sequence[Params]) -> Params:
    """Stacks the tensors of equal names along a new first dimension."""
    return {name: join(torch.stack, [tree[name] for tree in trees]) for name in trees[0]}


def map_tree(function: Callable[[Tensor], Tensor], tree: Params) -> Params:
    """Applies ``function`` to every tensor."""
    return {
        name: function(value) if isinstance(value, Tensor) else tree_map_only(Tensor, function, value)
        for name, value in tree.items()
    }


def join(function: Callable[[list[Tensor]], Tensor], values: Sequence[Any]) -> Any:
    """``function`` of all the values, tensors or (as a net may give them) equal tuples or dicts of tensors."""
    if isinstance(values[0], Tensor):
        return function(list(values))
    return tree_map(lambda *leaves: function(list(leaves)) if isinstance(leaves[0], Tensor) else leaves[0], *values)
