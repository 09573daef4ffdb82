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

_STARTS = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]


def depends(tensor: Tensor) -> bool:
    """Whether a gradient reaches the tensor, by autograd or at any level of ``torch.func``."""
    return any(level.requires_grad for level in levels(tensor))


def below_this_level(tensor: Tensor | None) -> Tensor | None:
    """The tensor as a constant to the innermost ``torch.func.grad`` that runs now, and to that one alone."""
    if tensor is None or not under_torch_func():
        return tensor
    return functorch._unwrap_for_grad(tensor, functorch.maybe_current_level())


def explicit(function: Callable[..., Any], what: str, instead: str = "in the batch") -> Callable[..., Any]:
    """The same function; it raises NetError where its result depends on a captured tensor that a gradient should reach.

    what, instead: the function's name and where the tensor belongs, for the message.

    Its gradient with respect to that tensor would otherwise be lost without a word, wherever a backward pass runs the
    function again on its arguments alone.
    """
    if torch.compiler.is_compiling():
        return function

    def call(*arguments: Any) -> Any:
        with _OnlyArguments(arguments, what, instead) as watch:
            result = function(*arguments)
        watch.check(result)
        return result

    return call


def explicit_at_first(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """``explicit`` for what an inner loop calls with the step's number as fourth argument, in step 0 alone.

    The look costs more than a small net's step, and later steps compute with what the first did.
    """
    watched = explicit(function, what)

    def call(*arguments: Any) -> Any:
        return (function if arguments[3] else watched)(*arguments)

    return call


def with_captured(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, list[Tensor]]:
    """``function(*arguments)``, and the tensors that require grad on which it depends and which are neither in the
    arguments nor made by the function itself. Under autograd alone."""
    with _OnlyArguments(arguments, "", "") as watch:
        result = function(*arguments)
    found = {id(leaf): leaf for each in _tensors(result) for leaf in leaves_behind(each)}
    return result, [leaf for leaf in found.values() if id(leaf) not in watch.known]


def leaves_behind(value: Tensor) -> list[Tensor]:
    """The tensors that require grad from which autograd computed the value, itself if it is one."""
    if value.grad_fn is None:
        return [value] if value.requires_grad else []
    nodes, seen, found = [value.grad_fn], {value.grad_fn}, []
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            found.append(node.variable)
        behind = {before for before, _ in node.next_functions if before is not None} - seen
        seen |= behind
        nodes += behind
    return found


class _OnlyArguments(TorchFunctionMode):
    """Looks at every torch function that gives a result which a gradient reaches.

    Tensors are known by their ``id``: a captured one lives longer than the call, so no temporary can have had its own.
    What was computed from a captured one is kept, and so are their ids; it may be cut from its graph later (the output
    of a teacher), so only what the function gives back decides.
    """

    def __init__(self, arguments: Any, what: str, instead: str):
        super().__init__()
        self.what, self.instead = what, instead
        self.arguments = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        self.known = {id(leaf) for leaf in self.arguments}
        self.lost: dict[int, tuple[Tensor, str]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # A graph of the function's own begins, on a constant.
        its_own = func in _STARTS and not depends(args[0])
        result = func(*args, **(kwargs or {}))
        if its_own:
            self.known.add(id(args[0]))
            return result
        found = [tensor for tensor in _tensors(result) if depends(tensor)]
        if found:
            name = getattr(func, "__name__", str(func))
            given = _tensors((*args, *(kwargs or {}).values()))
            loss = next((message for t in given if (message := self._lost(t, name))), None)
            if loss is None:
                self.known.update(map(id, found))
            else:
                self.lost.update((id(tensor), (tensor, loss)) for tensor in found)
        return result

    def check(self, result: Any) -> None:
        """Raises NetError where the function's result depends on a captured tensor."""
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (message := self._lost(tensor, "return")):
                raise NetError(message)

    def _lost(self, tensor: Tensor, function: str) -> str | None:
        """What is wrong where the tensor is, or was computed from, a captured one; None where nothing is."""
        for level in levels(tensor):
            if id(level) in self.lost:
                return self.lost[id(level)][1]
        if id(tensor) in self.known or not depends(tensor):
            return None
        # A transform inside the function wraps what it is given, and unwraps what it gives.
        if any(id(level) in self.known or self._computed_here(level) for level in levels(tensor)):
            return None
        return (
            f"{self.what} computes ({function}) with a tensor {list(tensor.shape)} that requires grad but is not among "
            f"its arguments, so its gradient would be lost; pass it {self.instead}, or call requires_grad_(False) on "
            "it where it is a constant"
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
