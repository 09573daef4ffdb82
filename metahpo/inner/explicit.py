"""What a function depends on: its arguments, or tensors that it captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from metahpo.errors import NetError
from metahpo.functional.levels import functorch, levels, under_torch_func


def depends(tensor: Tensor) -> bool:
    """Whether a gradient reaches the tensor, by autograd or at any level of ``torch.func``."""
    return any(level.requires_grad for level in levels(tensor))


def below_this_level(tensor: Tensor | None) -> Tensor | None:
    """The tensor as a constant to the innermost ``torch.func.grad`` that runs now, and to that one alone."""
    if tensor is None or not under_torch_func():
        return tensor
    return functorch._unwrap_for_grad(tensor, functorch.maybe_current_level())


def explicit(function: Callable[..., Any], what: str, instead: str = "in the batch") -> Callable[..., Any]:
    """The same function; it raises NetError where it computes with a captured tensor that a gradient should reach.

    what, instead: the function's name and where the tensor belongs, for the message.

    Its gradient with respect to that tensor would otherwise be lost without a word, wherever a backward pass runs the
    function again on its arguments alone.
    """
    if torch.compiler.is_compiling():
        return function

    def call(*arguments: Any) -> Any:
        with _OnlyArguments(arguments, what, instead):
            return function(*arguments)

    return call


def explicit_at_first(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """``explicit`` for what an inner loop calls with the step's number as fourth argument, in step 0 alone.

    The look costs more than a small net's step, and later steps compute with what the first did.
    """
    watched = explicit(function, what)

    def call(*arguments: Any) -> Any:
        return (function if arguments[3] else watched)(*arguments)

    return call


class _OnlyArguments(TorchFunctionMode):
    """Looks at every torch function that gives a result which a gradient reaches.

    Tensors are known by their ``id``: a captured one lives longer than the call, so no temporary can have had its own.
    """

    def __init__(self, arguments: Any, what: str, instead: str):
        super().__init__()
        self.what, self.instead = what, instead
        self.arguments = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        self.known = {id(leaf) for leaf in self.arguments}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # The start of a transform inside the function, on a constant.
        its_own = func is Tensor.requires_grad_ and not depends(args[0])
        result = func(*args, **(kwargs or {}))
        if its_own:
            self.known.add(id(result))
            return result
        found = [tensor for tensor in _tensors(result) if depends(tensor)]
        if found:
            for tensor in _tensors((*args, *(kwargs or {}).values())):
                self._check(tensor, func)
            self.known.update(map(id, found))
        return result

    def _check(self, tensor: Tensor, func: Any) -> None:
        if id(tensor) in self.known or not depends(tensor):
            return
        # A transform inside the function wraps what it is given, and unwraps what it gives.
        if any(id(level) in self.known or self._computed_here(level) for level in levels(tensor)):
            return
        raise NetError(
            f"{self.what} computes ({getattr(func, '__name__', func)}) with a tensor {list(tensor.shape)} that "
            f"requires grad but is not among its arguments, so its gradient would be lost; pass it {self.instead}"
        )

    def _computed_here(self, tensor: Tensor) -> bool:
        """Whether all that autograd sees behind the tensor is the arguments: a user's autograd.Function made it, which
        is no torch function."""
        if tensor.grad_fn is None:
            return False
        seen: set[Any] = {argument.grad_fn for argument in self.arguments} | {None}
        nodes: list[Any] = [tensor.grad_fn]
        while nodes:
            node = nodes.pop()
            if node not in seen:
                seen.add(node)
                nodes += [behind for behind, _ in node.next_functions]
                if hasattr(node, "variable") and id(node.variable) not in self.known:
                    return False
        return True


def _tensors(tree: Any):
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for child in tree:
            yield from _tensors(child)
    elif isinstance(tree, dict):
        for child in tree.values():
            yield from _tensors(child)
