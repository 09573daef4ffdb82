"""The inner gradient by mixed-mode differentiation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp
from torch.utils._pytree import tree_leaves

from metahpo.checks import check_choice
from metahpo.errors import NetArgumentError, NetError, one_line
from metahpo.functional.kernels import constants_without_tangents, forward_mode
from metahpo.functional.levels import under_torch_func
from metahpo.functional.trees import Params
from metahpo.inner.explicit import explicit_at_first
from metahpo.inner.gradient import InnerLoss, Reverse
from metahpo.inner.recompute import cut, fresh, pulled_back, recomputed, replaced


@dataclass(frozen=True)
class Mixed:
    """Reverse mode for the inner gradient, forward over reverse for the outer gradient through it: exact, and no
    activation of an inner step is kept (MixFlow-MG, Kemaev et al. 2025, section 3, arXiv 2505.00793).

    Of an inner step only its arguments are kept: K steps take K times the parameters, not K times the activations. For
    a cotangent v of the gradient, the Hessian's symmetry makes its backward pass the derivative along v, in the
    parameters, of the gradient with respect to parameters and all else; one forward-mode pass over one reverse pass
    gives it. The loss's value and the new carry are differentiable too, in the same pass, and so is the outer gradient.

    The loss must get every tensor that an outer gradient should reach by ``params``, ``carry`` or ``batch``: one that
    it captured raises NetError in step 0, the only one looked at. The loss runs once more in the backward pass, with
    the same random numbers (dropout).

    form: "func" by ``torch.func``, which every engine runs; "dual" by dual numbers over ``torch.autograd.grad``, for
    nets that ``torch.func`` refuses and inside saved-tensor hooks (``torch.utils.checkpoint``, offloading), but not
    under ``torch.func`` itself (engine vmap); it takes about three quarters of the time. "auto": "func" under
    ``torch.func``, else "dual".

    Raises NetError where a layer has no forward-mode derivative. Forward mode through the whole (``torch.func.jvp`` of
    an unrolled loop) is not defined: take ``Reverse`` there.
    """

    form: Literal["auto", "func", "dual"] = "auto"

    def __post_init__(self):
        check_choice(self, "form", self.form, ("auto", "func", "dual"), error=NetArgumentError)

    def __call__(
        self, loss: InnerLoss, params: Params, carry: Any, batch: Any, step: int
    ) -> tuple[Params, Tensor, Any]:
        if self.form == "dual" and under_torch_func():
            raise NetError(
                "Mixed(form='dual') does not run under torch.func (engine vmap); choose Mixed(form='func') or engine "
                "loop"
            )
        names = list(params)

        def run(tree):
            tensors, carry, batch = tree
            with _refusals():
                watched = explicit_at_first(loss, "the inner loss")
                grads, value, new = Reverse()(watched, dict(zip(names, tensors)), carry, batch, step)
            return [grads[name] for name in names], value, new

        def pull(rebuild, tensors, cotangents, wanted):
            count = len(names)
            seeds = [torch.zeros_like(t) if c is None else c for t, c in zip(tensors, cotangents[:count])]
            # The carry's leaves that something depends on; the value always, as the gradient is its own.
            carried = [i for i, c in enumerate(cotangents[count + 1 :]) if c is not None]
            others = [i for i in wanted if i >= count]

            def outputs(*chosen: Tensor) -> tuple[Tensor, ...]:
                given, carry, batch = rebuild(replaced(tensors, [*range(count), *others], chosen))
                with constants_without_tangents():
                    value, new = loss(dict(zip(names, given)), carry, batch, step)
                leaves = tree_leaves(new)
                return value, *(leaves[i] for i in carried)

            last = [cotangents[count], *(cotangents[count + 1 + i] for i in carried)]
            by_func = self.form == "func" or (self.form == "auto" and under_torch_func())
            product = _product_by_func if by_func else _product_by_dual
            with forward_mode(), warnings.catch_warnings(), _refusals():
                # torch's own, where it makes a layer's forward mode.
                warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
                found = product(outputs, tensors[:count], [tensors[i] for i in others], seeds, last)
            by_place = dict(zip([*range(count), *others], found))
            return [by_place[i] for i in wanted]

        # As views, so that a tensor which is also in the batch or the carry keeps its two roles apart.
        views = [p.view_as(p) for p in params.values()]
        grads, value, carry = recomputed(run, pull, (views, carry, batch))
        return dict(zip(names, grads)), value, carry


# The product: with (L, c) = outputs(params, others), v = seeds and (u, w) = last, what reaches params and others is
#     d/de  pull-back at params + e v  of  (1 + e u, e w)      at e = 0,
# the mixed second derivatives of L along v, plus u times L's gradient, plus w pulled back through the carry.


def _product_by_func(outputs, params, others, seeds, last) -> list[Tensor]:
    def pulled(params: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]):
        return pulled_back(outputs, [*params, *others], cotangents)

    starts, slopes = _seeds_of(last, params[0])
    return list(jvp(pulled, (tuple(params), starts), (tuple(seeds), slopes))[1])


def _product_by_dual(outputs, params, others, seeds, last) -> list[Tensor]:
    twice = torch.is_grad_enabled()
    with torch.enable_grad(), forward_ad.dual_level():
        inputs = [forward_ad.make_dual(p, seed) for p, seed in zip(fresh(params, twice), seeds)]
        inputs += fresh(others, twice)
        starts = [forward_ad.make_dual(*pair) for pair in zip(*_seeds_of(last, params[0]))]
        pairs = [(out, start) for out, start in zip(outputs(*inputs), starts) if out.requires_grad]
        results, starts = zip(*pairs)
        # With a graph though none may be asked for: the backward passes of some layers (group norm) have a forward mode
        # in their differentiable form alone.
        grads = torch.autograd.grad(
            results, inputs, starts, allow_unused=True, materialize_grads=True, create_graph=True
        )
        tangents = [forward_ad.unpack_dual(g).tangent for g in grads]
        tangents = [torch.zeros_like(x) if t is None else t for x, t in zip([*params, *others], tangents)]
    return tangents if twice else cut(tangents)


def _seeds_of(last, like: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(1, 0, ...) and the cotangents (u, w, ...) of the value and the carry."""
    value, *carry = last
    one = torch.ones((), dtype=like.dtype, device=like.device) if value is None else torch.ones_like(value)
    slopes = (torch.zeros_like(one) if value is None else value, *carry)
    return (one, *map(torch.zeros_like, carry)), slopes


# Of torch's messages where a gradient is taken inside forward mode or inside torch.func.
_OWN_GRADIENT = ("ZeroTensors are immutable", "requires_grad_()")


@contextmanager
def _refusals() -> Iterator[None]:
    """torch's own refusals, by name and with what to choose instead."""
    try:
        yield
    except NotImplementedError as error:
        raise NetError(
            f"the inner gradient Mixed needs forward mode, which a layer of the net has not ({one_line(error)}); "
            "choose Reverse() with remat Every(1)"
        ) from error
    except RuntimeError as error:
        if any(text in str(error) for text in _OWN_GRADIENT):
            raise NetError(
                f"the inner gradient Mixed cannot run a net or loss that takes a gradient itself "
                f"({one_line(error, 100)}); choose Reverse(), with remat Every(1) for as little memory"
            ) from error
        if "saved tensor hooks" not in str(error):
            raise
        raise NetError(
            "Mixed(form='func') does not run inside saved-tensor hooks (torch.utils.checkpoint, offloading); choose "
            "Mixed(form='dual')"
        ) from error
