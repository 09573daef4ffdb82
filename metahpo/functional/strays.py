"""Tensors that a net computes with though they are not among those that it was given."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from metahpo.errors import NetError
from metahpo.functional.levels import functorch, under_torch_func
from metahpo.functional.trees import Params


@contextmanager
def refuse_strays(net: nn.Module, given: Params, inputs: Any) -> Iterator[list[Any]]:
    """Raises NetError for tensors that ``net``, run inside with ``given`` in place of its own, reaches otherwise.

    Yields:
        A list that takes what the call gives.
    """
    outputs: list[Any] = []
    rest = [t for name, t in [*net.named_parameters(), *net.named_buffers()] if name not in given]
    strays = _Strays(net, [given, rest, inputs])
    with strays:
        yield outputs
    strays.check(outputs)


class _Strays(TorchFunctionMode):
    """Looks at one call of a net for tensors that require grad and that it reaches past its registered parameters.

    A list of weights, a function or a hook over ``self`` of the net before it was copied: such a tensor
    is not exchanged for the one given, so it would neither adapt nor learn, and no error would say so.
    Constants (no ``requires_grad``, ``no_grad`` around them) and tensors made during the call are fine.

    Args:
        net: the net that is called, for the message.
        given: all that it may compute with.
    """

    def __init__(self, net: nn.Module, given: Iterable[Any]):
        super().__init__()
        self.net = net
        self.given = [leaf for leaf in tree_leaves(list(given)) if isinstance(leaf, Tensor)]
        self.known = set(map(id, self.given))
        self.found: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        arguments = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        begins = bool(args) and func in _BEGIN and not args[0].requires_grad
        # Under torch.func the graph may be that of a level which this tensor is not part of.
        if under_torch_func() and torch.is_grad_enabled():
            self.found += [t for t in arguments if self._stray(t) and _depends(func, args, kwargs, t)]
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        # Some functions (contiguous, to) give back what they are given.
        self.known.update({id(t) for t in made} - {id(t) for t in arguments})
        if begins:
            self.known.add(id(args[0]))
        return result

    def check(self, output: Any) -> None:
        """Raises NetError for what the call computed with; output: what it gave."""
        found = self.found if under_torch_func() else [*self.found, *filter(self._stray, self._leaves(output))]
        if found:
            name = _name(found[0], self.net)
            what = f"{name}, a tensor {list(found[0].shape)}" if name else f"a tensor {list(found[0].shape)}"
            raise NetError(
                f"{type(self.net).__name__} computes with {what} that requires grad but is not among the parameters "
                "given to it, so it would never adapt; register it (nn.Parameter, nn.ParameterList, nn.ModuleList) "
                "and reach it as an attribute of its module, or set requires_grad_(False) where it is a constant"
            )

    def _stray(self, tensor: Tensor) -> bool:
        if id(tensor) in self.known or functorch.is_functorch_wrapped_tensor(tensor):
            return False
        return tensor.is_leaf and tensor.requires_grad

    def _leaves(self, output: Any) -> Iterator[Tensor]:
        """The leaves that autograd sees behind the output, short of what is behind the tensors given."""
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        yield from outputs
        seen: set[Any] = {None, *(t.grad_fn for t in self.given)}
        nodes: list[Any] = [t.grad_fn for t in outputs if id(t) not in self.known or t.grad_fn not in seen]
        while nodes:
            node = nodes.pop()
            if node not in seen:
                seen.add(node)
                nodes += [behind for behind, _ in node.next_functions]
                if hasattr(node, "variable"):
                    yield node.variable


_BEGIN = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]


def _depends(func: Any, args: Any, kwargs: Any, tensor: Tensor) -> bool:
    """Whether what ``func`` gives has a derivative in the tensor (``zeros_like`` has none)."""
    found: list[bool] = []

    def run(stand_in: Tensor) -> Tensor:
        def replace(leaf: Any) -> Any:
            if leaf is tensor:
                return stand_in
            # As func may write into it.
            return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf

        here, named = tree_map(replace, (args, kwargs))
        result = func(*here, **named)
        found.extend(leaf.requires_grad for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return stand_in

    with torch.random.fork_rng(devices=[]):
        torch.func.vjp(run, tensor.detach())
    return any(found)


def _name(tensor: Tensor, net: nn.Module) -> str | None:
    """How the net reaches the tensor, by another way than as its own parameter where there is one."""
    kind = type(net).__name__
    own = {f"{kind}.{name}" for name, _ in net.named_parameters(remove_duplicate=False)}
    queue: list[tuple[str, Any]] = [(kind, net)]
    seen: set[int] = set()
    registered = None
    for path, thing in queue:
        if thing is tensor and path not in own:
            return path
        if thing is tensor:
            registered = path
            continue
        if id(thing) not in seen and len(queue) < 100_000:
            seen.add(id(thing))
            queue += _inside(path, thing)
    return registered


def _inside(path: str, thing: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, Mapping):
        yield from ((f"{path}[{key!r}]", value) for key, value in thing.items())
    elif isinstance(thing, (list, tuple, set, frozenset)):
        yield from ((f"{path}[{index}]", value) for index, value in enumerate(thing))
    elif isinstance(thing, types.FunctionType):
        for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or ()):
            with suppress(ValueError):  # One that is still empty.
                yield f"{path} -> {name}", cell.cell_contents
        names = dict.fromkeys(_names(thing.__code__))
        used = {name: thing.__globals__[name] for name in names if name in thing.__globals__}
        yield from ((f"{path} -> {name}", value) for name, value in used.items() if not isinstance(value, type))
        yield from ((f"{path} -> a default", value) for value in thing.__defaults__ or ())
    elif isinstance(thing, types.MethodType):
        yield from ((f"{path} -> self", thing.__self__), (path, thing.__func__))
    elif isinstance(thing, functools.partial):
        yield from ((path, part) for part in (thing.func, thing.args, thing.keywords))
    elif isinstance(thing, nn.Module):
        for key, value in vars(thing).items():
            if key in ("_parameters", "_buffers", "_modules"):
                yield from ((f"{path}.{name}", part) for name, part in value.items())
            else:
                yield f"{path}.{key}", value
        if not type(thing).__module__.startswith("torch."):
            yield f"{path}.forward", type(thing).forward
    elif hasattr(thing, "__dict__") and not isinstance(thing, (types.ModuleType, type, Tensor)):
        yield from ((f"{path}.{key}", value) for key, value in vars(thing).items())


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
