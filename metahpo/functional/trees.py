"""Trees of tensors: the few operations on dicts of tensors by name that the package needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Params = dict[str, Tensor]


def stack_trees(trees: Sequence[Params]) -> Params:
    """Stacks the tensors of equal names along a new first dimension."""
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def map_tree(function: Callable[[Tensor], Tensor], tree: Params) -> Params:
    """Applies ``function`` to every tensor."""
    return {name: function(tensor) for name, tensor in tree.items()}
