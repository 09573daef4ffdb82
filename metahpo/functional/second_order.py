"""Naming the layer that cannot be differentiated twice, in place of torch's own errors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._pytree import tree_leaves, tree_map_only

from metahpo.errors import NetError, one_line
from metahpo.functional.copies import copied
from metahpo.functional.formulas import ByFormula
from metahpo.functional.kernels import twice_differentiable

# Of torch's messages: a kernel or a function of Python without a second derivative, and a backward
# pass that writes its result into a buffer.
_MESSAGES = ("derivative for", "differentiate twice", "ouble backward", "functions with out=")
_LONGEST_LOOK = 20_000


@contextmanager
def second_derivatives(
    forward: Callable[[], Any], instead: str = "first_order=True"
) -> Iterator[None]:
    """Inside it, an error of torch's for a missing second derivative names the layer that lacks it.

    Args:
        forward: computes the loss or losses again, to find the layer after an error.
        instead: the option that needs no second derivative, for the message.

    Raises:
        NetError: In place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_missing(error):
            raise
        raise _refusal(forward, one_line(error, 120), instead) from error


def check_graph(
    value: Tensor, forward: Callable[[], Any], instead: str = "first_order=True"
) -> None:
    """Looks for backward passes of ``once_differentiable`` functions in the graph of ``value``.

    torch raises nothing there: it takes their results for constants, and the gradient is wrong.

    Raises:
        NetError: If there is one; it names the layer.
    """
    if _is_cut(value):
        raise _refusal(forward, "a function marked once_differentiable", instead)


def _refusal(forward: Callable[[], Any], reason: str, instead: str) -> NetError:
    layer = _layer(forward) or "the loss, or an operation outside of torch's modules,"
    return NetError(
        f"{layer} has no second derivative ({reason}), which the outer gradient needs; choose "
        f"{instead}, which does not, or another in its place"
    )


def _is_missing(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def _is_cut(value: Tensor) -> bool:
    seen, nodes = set(), [value.grad_fn]
    while nodes and len(seen) < _LONGEST_LOOK:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            return True
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
    return False


def _layer(forward: Callable[[], Any]) -> str | None:
    """The innermost module called by ``forward`` that cannot be differentiated twice by itself."""
    names: dict[int, str] = {}
    calls: dict[int, tuple[nn.Module, Any]] = {}
    thread = threading.get_ident()

    def entered(module: nn.Module, _: Any) -> None:
        if threading.get_ident() == thread and id(module) not in names:
            names.update({id(part): name for name, part in module.named_modules()})

    def left(module: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
        if threading.get_ident() == thread:
            calls.setdefault(id(module), (module, (args, kwargs)))

    handles = [
        hooks.register_module_forward_pre_hook(entered),
        hooks.register_module_forward_hook(left, with_kwargs=True),
    ]
    try:
        # It may fail as it did before, after the modules have run.
        with suppress(Exception):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    for module, arguments in calls.values():  # Inner modules are left before outer ones.
        if _lacks_second(module, arguments):
            name, kind = names[id(module)], type(module).__name__
            return f"module {name!r} ({kind})" if name else f"this {kind}"
    return None


def _lacks_second(module: nn.Module, arguments: Any) -> bool:
    inputs: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        inputs.append(tensor.detach().clone().requires_grad_())
        return inputs[-1].clone()  # A module in place may not write into a leaf.

    try:
        args, kwargs = tree_map_only(Tensor, leaf, arguments)
        twin = copied(module)  # Which may change its buffers.
        wanted = [*inputs, *(p for p in twin.parameters() if p.requires_grad)]
        with torch.enable_grad(), ByFormula(), twice_differentiable(True):
            value = _curved([t for t in tree_leaves(twin(*args, **kwargs)) if isinstance(t, Tensor)])
            slopes = torch.autograd.grad(value, wanted, create_graph=True, allow_unused=True)
            slope = _curved([g for g in slopes if g is not None])
        if _is_cut(slope):
            return True
        torch.autograd.grad(slope, wanted, allow_unused=True)
    except Exception as error:
        return _is_missing(error)
    return False


def _curved(tensors: list[Tensor]) -> Tensor:
    """A scalar whose gradient depends on each of the tensors."""
    return torch.stack([t.abs().square().sum() for t in tensors if t.requires_grad]).sum()
