"""Functions that keep nothing but their arguments: a backward pass runs them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import grad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from metahpo.functional.levels import under_torch_func
from metahpo.inner.explicit import below_this_level, depends
from metahpo.inner.randomness import Draws

Cotangents = Sequence[Tensor | None]


class Pull(Protocol):
    """The backward pass of a recomputed function."""

    def __call__(
        self, rebuild: Callable[[Sequence[Tensor]], Any], tensors: Sequence[Tensor], cotangents: Cotangents, wanted
    ) -> Cotangents:
        """What reaches ``tensors[i]`` for each i in ``wanted``.

        rebuild: makes the function's argument from tensors; cotangents: one for each leaf of its result, None for zero.
        """
        ...


def recomputed(run: Callable[[Any], Any], pull: Pull, tree: Any) -> Any:
    """``run(tree)``, whose backward pass is ``pull``; only the tensors of ``tree`` are kept for it.

    tree, result: any trees of tensors and other values. Works under autograd, ``torch.func`` and ``vmap``, for
    gradients of any order that ``pull`` allows. ``run`` must depend on no other tensor that a gradient should reach.
    What ``pull`` runs again draws the same random numbers.
    """
    leaves, spec = tree_flatten(tree)
    places: dict[int, int] = {}
    slots = [places.setdefault(id(x), len(places)) if isinstance(x, Tensor) else None for x in leaves]
    tensors = list({id(x): x for x in leaves if isinstance(x, Tensor)}.values())
    wanted = [i for i, t in enumerate(tensors) if t.is_floating_point() and depends(t)]
    if not wanted or not torch.is_grad_enabled():
        return run(tree)
    others = [None if isinstance(x, Tensor) else x for x in leaves]

    def rebuild(given: Sequence[Tensor]) -> Any:
        return tree_unflatten([x if i is None else given[i] for x, i in zip(others, slots)], spec)

    call = _Call(run, pull, rebuild, wanted, Draws(tensors))
    return call.result(tensors, _Recomputed.apply(call, *tensors))


class _Call:
    """One call of a recomputed function; it holds no tensor."""

    def __init__(self, run, pull: Pull, rebuild, wanted: list[int], draws: Draws):
        self.run, self.pull, self.rebuild, self.wanted, self.draws = run, pull, rebuild, wanted, draws
        self.layout: list[tuple[str, Any]] = []

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with self.draws.recording():
            leaves, self.spec = tree_flatten(self.run(self.rebuild(tensors)))
        inputs, outputs = {id(t): i for i, t in enumerate(tensors)}, {}
        self.layout = []
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                self.layout.append(("value", leaf))
            elif id(leaf) in inputs:
                # An argument handed through keeps its own gradient.
                self.layout.append(("input", inputs[id(leaf)]))
            else:
                outputs.setdefault(id(leaf), (len(outputs), leaf))
                self.layout.append(("output", outputs[id(leaf)][0]))
        return tuple(leaf for _, leaf in outputs.values())

    def result(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Any:
        sources = {"input": inputs, "output": outputs}
        leaves = [x if kind == "value" else sources[kind][x] for kind, x in self.layout]
        return tree_unflatten(leaves, self.spec)

    def backward(self, tensors: Sequence[Tensor], cotangents: Cotangents) -> list[Tensor | None]:
        left = list(cotangents)
        by_leaf: list[Tensor | None] = []
        for kind, x in self.layout:
            by_leaf.append(left[x] if kind == "output" else None)
            if kind == "output":
                left[x] = None  # A result that stands in two places is one.
        found: list[Tensor | None] = [None] * len(tensors)
        if any(c is not None for c in by_leaf):
            with self.draws.replaying():
                pulled = self.pull(self.rebuild, tensors, by_leaf, self.wanted)
            for i, cotangent in zip(self.wanted, pulled):
                found[i] = cotangent
        return found


class _Recomputed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        return call.forward(tensors)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.call = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, *cotangents: Tensor | None):
        # ``torch.func.grad`` always records its own backward pass, though no one can differentiate at its level again;
        # all that is computed again would be kept. Levels below, which may be differentiated, stay as they are.
        saved, given = ([below_this_level(t) for t in ts] for ts in (ctx.saved_tensors, cotangents))
        return None, *ctx.call.backward(saved, given)


def pull_by_reverse(run: Callable[[Any], Any]) -> Pull:
    """The backward pass of ``run`` by reverse mode through it, run again with what it keeps."""

    def pull(rebuild, tensors, cotangents, wanted):
        def outputs(*chosen: Tensor) -> tuple[Tensor, ...]:
            leaves = tree_leaves(run(rebuild(replaced(tensors, wanted, chosen))))
            return tuple(leaf for leaf, c in zip(leaves, cotangents) if c is not None)

        given = tuple(c for c in cotangents if c is not None)
        inputs = [tensors[i] for i in wanted]
        if under_torch_func():
            return pulled_back(outputs, inputs, given)
        # Not by torch.func, so that what it refuses can stand inside (saved-tensor hooks, dual numbers).
        twice = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs = fresh(inputs, twice)
            pairs = [(out, c) for out, c in zip(outputs(*inputs), given) if out.requires_grad]
            if not pairs:
                return [None] * len(inputs)
            results, seeds = zip(*pairs)
            return torch.autograd.grad(results, inputs, seeds, allow_unused=True, create_graph=twice)

    return pull


def pulled_back(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], cotangents
) -> tuple[Tensor, ...]:
    """The vector-Jacobian product of ``function(*inputs)``, zeros for an input that it does not use."""

    # By ``grad`` and not ``vjp``: torch 2.15 runs vjp's product after it has left its level, and there fails to make
    # the zeros when the levels are nested.
    def weighed(*inputs: Tensor) -> Tensor:
        return torch.stack([(out * c).sum() for out, c in zip(function(*inputs), cotangents)]).sum()

    return grad(weighed, argnums=tuple(range(len(inputs))))(*inputs)


def replaced(tensors: Sequence[Tensor], places: Sequence[int], new: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with those at ``places`` exchanged."""
    given = list(tensors)
    for i, tensor in zip(places, new):
        given[i] = tensor
    return given


def fresh(tensors: Sequence[Tensor], linked: bool) -> list[Tensor]:
    """Each tensor as the start of a graph of its own; ``linked`` to the graph it came from, or cut from it."""
    return [(t.view_as(t) if linked and t.requires_grad else cut(t).requires_grad_()) for t in tensors]


def cut(tree: Any) -> Any:
    """The same tensors without their graph; unlike ``detach`` it leaves forward-mode tangents alone."""
    with torch.no_grad():
        return tree_map(lambda leaf: leaf.view_as(leaf) if isinstance(leaf, Tensor) else leaf, tree)
