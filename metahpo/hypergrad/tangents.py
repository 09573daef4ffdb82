"""One step of a training together with its derivatives in the hyperparameters."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from metahpo.errors import NetError, one_line, out_of_memory
from metahpo.functional.kernels import forward_mode
from metahpo.functional.swap import call_with
from metahpo.functional.trees import Params
from metahpo.inner.problem import InnerProblem, split
from metahpo.inner.randomness import Draws
from metahpo.inner.rules.base import RuleState, UpdateRule


class Tangents(NamedTuple):
    """Derivatives in ``width`` scalars: [width, *shape] for each parameter and each floating tensor of a rule's
    state."""

    width: int
    params: list[Tensor]
    state: list[Tensor]


def zeros(params: Params, state: RuleState, width: int) -> Tangents:
    """Nothing depends on the scalars yet."""
    parts = (list(params.values()), [leaf for leaf in tree_leaves(state) if _moves(leaf)])
    params_, state_ = ([t.new_zeros(width, *t.shape) for t in part] for part in parts)
    return Tangents(width, params_, state_)


class Step:
    """One step from (params, state): its result (``params``, ``state``, the ``loss`` before it and the ``carry`` after
    it), and its derivative along any directions.

    The gradient's derivative along (dw, dh) is the product of the loss's Hessian in (w, h) with it, of which reverse
    mode over the gradient's graph gives the part in w: no layer needs a forward mode, and the graph serves all
    directions. The rule's is by forward mode. A rule that asks for the loss is differentiated together with it.
    """

    def __init__(
        self,
        problem: InnerProblem,
        rule: UpdateRule,
        params: Params,
        state: RuleState,
        hparams: Params,
        batch: Any,
        step: int,
        carry: Any,
    ):
        self.names, self.hnames, self.step = list(params), list(hparams), step
        self.leaves, self.spec = tree_flatten(state)
        moving = [leaf for leaf in self.leaves if _moves(leaf)]
        self.primals = [*params.values(), *moving, *hparams.values()]
        self.sizes = (len(params), len(moving), len(hparams))
        self.problem, self.rule, self.batch, self.start = problem, rule, batch, carry
        self.draws = Draws(params.values())
        self.gradient = None
        if not getattr(rule, "needs_loss", False):
            skips_unused = getattr(rule, "skips_unused", False)
            self.gradient = _Gradient(problem, params, split(hparams)[0], batch, carry, skips_unused)
            self.primals += self.gradient.grads
        with self.draws.recording():
            moved, self.state, self.loss, self.carry = self._move(*self.primals)
        self.params = dict(zip(self.names, moved))

    def pushed(self, tangents: Tangents, seed: Params) -> Tangents:
        """The tangents after the step; seed: the hyperparameters' own."""
        given = [*tangents.params, *tangents.state, *seed.values()]
        if self.gradient:
            given += self.gradient.along(tangents.params, split(seed)[0])
        with self.draws.replaying():
            slopes = _slopes(lambda *tensors: self._move(*tensors)[:2], self.primals, given)
        count = len(self.names)
        return Tangents(tangents.width, slopes[:count], slopes[count:])

    def _move(self, *tensors: Tensor) -> tuple[list[Tensor], RuleState, Tensor, Any]:
        left = iter(tensors)
        params, moving, hparams = (list(islice(left, size)) for size in self.sizes)
        params, hparams = dict(zip(self.names, params)), dict(zip(self.hnames, hparams))
        given = iter(moving)
        state = tree_unflatten([next(given) if _moves(leaf) else leaf for leaf in self.leaves], self.spec)
        if self.gradient is None:
            end = self.problem.fit(
                self.rule, params, hparams, [self.batch], state=state, step=self.step, carry=self.start
            )
            params, state, loss, carry = end.params, end.state, end.losses[0], end.carry
        else:
            grads = {**dict.fromkeys(self.names), **dict(zip(self.gradient.used, left))}
            arguments = (params, grads, state, self.step)
            params, state = call_with(self.rule, split(hparams)[1], arguments)
            loss, carry = self.gradient.value, self.gradient.carry
        return [params[name] for name in self.names], state, loss, carry


class _Gradient:
    """The inner gradient at one place, with the graph for its derivatives."""

    def __init__(
        self, problem: InnerProblem, params: Params, hparams: Params, batch: Any, carry: Any, skips_unused: bool
    ):
        with torch.enable_grad():
            self.params, given = ([t.detach().requires_grad_() for t in ts.values()] for ts in (params, hparams))
            value, self.carry = problem.value(
                dict(zip(params, self.params)), dict(zip(hparams, given)), batch, carry
            )
            found = torch.autograd.grad(value, [*self.params, *given], create_graph=True, allow_unused=True)
        self.value = value.detach()
        self.firsts = found
        # Of the params that the loss uses, or of all where the rule takes zeros for the others.
        self.used = [name for name, g in zip(params, found) if g is not None or not skips_unused]
        self._places = [i for i, name in enumerate(params) if name in self.used]
        self.grads = [
            torch.zeros_like(self.params[i]) if found[i] is None else found[i].detach() for i in self._places
        ]

    def along(self, params: Sequence[Tensor], hparams: Params) -> list[Tensor]:
        """The derivatives of ``grads`` along each of the directions, [count, *shape]."""
        directed = zip(self.firsts, [*params, *hparams.values()])
        pairs = [(g, t) for g, t in directed if g is not None and g.requires_grad]
        if not pairs:
            return [torch.zeros_like(params[i]) for i in self._places]
        found = _pulled(*zip(*pairs), self.params)
        return [torch.zeros_like(params[i]) if found[i] is None else found[i] for i in self._places]


def _pulled(
    outputs: Sequence[Tensor], seeds: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """The gradient of each input [count, *shape] for each of the seeds [count, *shape] of the outputs; None is zero."""

    def pull(seeds: Sequence[Tensor], batched: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            outputs, inputs, seeds, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )

    count = len(seeds[0])
    if count > 1:  # vmap costs more than it is worth for one.
        try:
            return pull(seeds, True)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
    # Some layers' gradients have no rule for it (in torch 2.11 GroupNorm's a wrong one): then one after the other.
    rows = [pull([seed[i] for seed in seeds], False) for i in range(count)]
    return [None if parts[0] is None else torch.stack(parts) for parts in zip(*rows)]


def _slopes(function: Callable[..., Any], primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor]:
    """The derivatives along the tangents of each floating leaf of ``function(*primals)``."""

    def floating(*tensors: Tensor) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(function(*tensors)) if _moves(leaf)]

    def along(*tangents: Tensor) -> list[Tensor]:
        return jvp(floating, tuple(primals), tangents)[1]

    with forward_mode(), warnings.catch_warnings(), _refusals():
        # torch's own, where it makes an operation's forward mode.
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        return vmap(along, randomness="same")(*tangents)


@contextmanager
def _refusals() -> Iterator[None]:
    """torch's own refusals of a rule, with what to choose instead."""
    try:
        yield
    except RuntimeError as error:
        said = one_line(error)
        if isinstance(error, NotImplementedError) or re.search("vmap|functorch|atching rule", said):
            raise NetError(
                "an operation of the rule has no forward mode, or none for several hyperparameters at once "
                f"({said}); choose Unroll()"
            ) from error
        raise


def _moves(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
