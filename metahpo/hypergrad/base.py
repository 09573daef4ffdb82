"""What every hypergradient strategy takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from metahpo.errors import HypergradientError, NetError, NonFiniteError, did_you_mean
from metahpo.functional.formulas import ByFormula
from metahpo.functional.lending import kept
from metahpo.functional.second_order import check_graph, second_derivatives
from metahpo.functional.swap import call_with
from metahpo.functional.trees import Params
from metahpo.inner.explicit import explicit, leaves_behind, with_captured
from metahpo.inner.problem import RULE, InnerProblem, constants, split
from metahpo.inner.rules.base import RuleState, UpdateRule

# (final params, hparams) -> scalar; with a third argument where the inner problem has a carry.
OuterLoss = Callable[..., Tensor]


@dataclass(frozen=True)
class Hypergradient:
    """The outer loss after an inner training, and its gradient in the hyperparameters.

    value: the outer loss (a scalar); grads: by the names of ``hparams``, each of its shape; final_params: after the
    last step; state: to go on from there with the same strategy; losses: the inner loss before each step, [K];
    warnings: what the caller should know, a line each (a hyperparameter that nothing uses, a solver that did not
    converge).
    """

    value: Tensor
    grads: Params
    final_params: Params
    state: Any
    losses: Tensor
    warnings: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class InnerState:
    """Where an inner training stands: the rule's state, the number of steps taken, a strategy's own memory, and the
    problem's carry (None: that of its first step)."""

    rule: RuleState
    step: int
    memory: Any = None
    carry: Any = None


class Strategy(Protocol):
    """A way to the gradient of ``outer_loss`` in ``hparams``, through or around an inner training."""

    def __call__(
        self,
        problem: InnerProblem,
        rule: UpdateRule,
        outer_loss: OuterLoss,
        params: Params,
        hparams: Params,
        batches: Iterable[Any],
        state: Any = None,
    ) -> Hypergradient:
        """Trains from ``params`` for one step a batch, then differentiates ``outer_loss(final params, hparams)``, or
        ``outer_loss(final params, hparams, carry)`` where the problem has a carry.

        hparams: by name, floating; those of the rule as "rule.NAME", which the two losses do not get. state: of an
        earlier Hypergradient by this strategy, whose ``final_params`` go with it.

        Raises HypergradientError for a captured hyperparameter, a loss that is no scalar, a name that the rule does
        not have; NonFiniteError where the training diverges.
        """
        ...


def leaves(hparams: Mapping[str, Tensor]) -> Params:
    """The hyperparameters as the start of a graph of their own."""
    return {name: h.detach().requires_grad_() for name, h in hparams.items()}


def collected(batches: Iterable[Any]) -> list[Any]:
    """All batches, as they were when each was given: a loader may fill the same memory again."""
    return list(batches) if isinstance(batches, (list, tuple)) else [kept(batch) for batch in batches]


def outer_value(outer_loss: OuterLoss, params: Params, hparams: Params, carry: Any) -> Tensor:
    """``outer_loss`` with the hyperparameters that are not the rule's, and with the problem's carry if it has one."""
    with ByFormula():
        return outer_loss(params, split(hparams)[0], *_given(carry))


def _given(carry: Any) -> tuple[Any, ...]:
    return () if carry is None else (carry,)


def twice_differentiated(
    problem: InnerProblem, outer_loss: OuterLoss, params: Params, hparams: Params, batch: Any, instead: str
) -> AbstractContextManager[None]:
    """Inside it a layer without a second derivative is named, and what needs none is told (``instead``)."""
    return second_derivatives(_forward(problem, outer_loss, params, hparams, batch), instead)


def _forward(
    problem: InnerProblem, outer_loss: OuterLoss, params: Params, hparams: Params, batch: Any
) -> Callable[[], None]:
    """Computes both losses, to find a layer in them."""

    def forward() -> None:
        _, carry = problem.value(params, split(hparams)[0], batch, problem.carry)
        outer_value(outer_loss, params, hparams, carry)

    return forward


def check_inputs(
    problem: InnerProblem,
    rule: UpdateRule,
    outer_loss: OuterLoss,
    params: Params,
    hparams: Params,
    batches: Sequence[Any],
    state: Any = None,
    instead: str | None = None,
) -> tuple[str, ...]:
    """Raises HypergradientError for what would be silently wrong; returns what the caller should know, a line each.

    Where a ``state`` is given an earlier call has looked at the losses, and only the tensors are. The look costs about
    one step, and one a batch for hyperparameters that no batch before used. instead: for a strategy that takes second
    derivatives, what needs none: NetError names a layer whose second derivative torch takes for zero, without an error.
    """
    warnings = check_tensors(params, batches)
    if state is not None:
        return warnings
    _check_names(rule, params, hparams)
    if not batches:
        raise HypergradientError("batches: found none, expected one for each inner step")
    with torch.enable_grad():
        originals, params, given = hparams, leaves(params), leaves(hparams)
        others, own = split(given)
        (inner, carry), captured = with_captured(problem.value, (params, others, batches[0], problem.carry))
        inner = _scalar(inner, "the inner loss")
        warnings += _constants(captured, "the inner loss", originals)
        outer, captured = with_captured(outer_loss, (params, others, *_given(carry)))
        outer = _scalar(outer, "the outer loss")
        warnings += _constants(captured, "the outer loss", originals)
        forward = _forward(problem, outer_loss, params, hparams, batches[0])
        with nullcontext() if instead is None else second_derivatives(forward, instead):
            slopes = _slopes(inner, params, create_graph=instead is not None)
        if not slopes:
            raise HypergradientError(
                "the inner loss does not depend on params (or cuts them from their graph), so there is nothing to train"
            )
        if instead is not None:
            total = torch.stack([slope.abs().sum() for slope in slopes.values()]).sum()
            check_graph(total, forward, instead)
        unused = _unused([inner, outer], others)
        if not rule.needs_loss and type(rule).forward is not UpdateRule.forward:
            _check_rule(rule, own, constants(slopes), params)
        lost = not _reached([outer], [*params.values(), *others.values()])
        for batch in batches[1:]:
            if not unused:
                break
            unused = _unused([problem.value(params, others, batch, problem.carry)[0]], unused)
    # Every rule uses its own, if not in every step.
    warnings += tuple(
        f"hyperparameter {name!r}: neither the losses nor the rule use it; its gradient is zero" for name in unused
    )
    if lost:
        warnings += (
            "the outer loss has no derivative in params nor in hparams (an accuracy, or cut from its graph), so every "
            "gradient that is had by differentiating it is zero",
        )
    return warnings


def check_tensors(params: Params, batches: Iterable[Any]) -> tuple[str, ...]:
    """Raises HypergradientError for parameters or batches computed from something that a gradient should reach: a
    strategy differentiates in ``hparams`` alone. A batch's tensor that merely requires grad gives a warning."""
    for name, p in params.items():
        if p.grad_fn is not None:
            raise HypergradientError(
                f"params[{name!r}] was computed from a tensor that requires grad ({p.grad_fn.name()}), whose gradient "
                "would be lost; for initial parameters that depend on hyperparameters train the difference from them: "
                "params of zeros, which the losses add to the initial ones that they compute from hparams"
            )
    found: list[Tensor] = []
    for batch in {id(batch): batch for batch in batches}.values():
        found += [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.requires_grad]
    for leaf in found:
        if leaf.grad_fn is not None:
            raise HypergradientError(
                f"batches: found a tensor {list(leaf.shape)} that was computed from one that requires grad "
                f"({leaf.grad_fn.name()}), whose gradient would be lost; pass that one in hparams and compute from it "
                "in the inner loss, or detach the batch"
            )
    if not found:
        return ()
    return (
        f"batches: a tensor {list(found[0].shape)} requires grad; gradients are those of hparams alone, so it is a "
        "constant",
    )


def _slopes(inner: Tensor, params: Params, create_graph: bool) -> Params:
    """The gradient of the inner loss, in those parameters that it depends on."""
    if not inner.requires_grad:
        return {}
    found = torch.autograd.grad(
        inner, list(params.values()), allow_unused=True, retain_graph=True, create_graph=create_graph
    )
    return {name: slope for name, slope in zip(params, found) if slope is not None}


def _check_rule(rule: UpdateRule, own: Params, slopes: Params, params: Params) -> None:
    """Raises HypergradientError if the rule's first step computes with a captured tensor that requires grad."""
    found = {name: slopes.get(name, torch.zeros_like(p)) for name, p in params.items()}
    with torch.no_grad():
        state = rule.init(constants(params))

    def update(own: Params, params: Params, grads: Params, state: RuleState) -> Params:
        return call_with(rule, own, (params, grads, state, 0))[0]

    try:
        explicit(update, "the update rule", "in hparams")(own, params, found, state)
    except NetError as error:
        raise HypergradientError(str(error)) from error


def _unused(values: Sequence[Tensor], hparams: Params) -> Params:
    """Those hyperparameters that no gradient of the values reaches."""
    used = {id(h) for h in _reached(values, hparams.values())}
    return {name: h for name, h in hparams.items() if id(h) not in used}


def _constants(captured: Sequence[Tensor], what: str, hparams: Params) -> tuple[str, ...]:
    """What to say of the tensors that a loss captured: parameters of a module (a frozen net) are constants, which a
    warning tells. Raises HypergradientError for a hyperparameter, or any other tensor that requires grad."""
    own = {id(t): name for name, h in hparams.items() for t in leaves_behind(h)}
    for tensor in captured:
        if id(tensor) in own:
            raise HypergradientError(
                f"{what} computes with hparams[{own[id(tensor)]!r}] as it was given to the strategy, so its gradient "
                "would be lost; compute with the one of that name which the loss gets in hparams"
            )
        if not isinstance(tensor, nn.Parameter):
            raise HypergradientError(
                f"{what} computes with a tensor {list(tensor.shape)} that requires grad but is not among its "
                "arguments, so its gradient would be lost; pass it in hparams, or call requires_grad_(False) on it"
            )
    if not captured:
        return ()
    return (
        f"{what} computes with {len(captured)} parameters of a module that require grad and are not in hparams (the "
        f"first is {list(captured[0].shape)}); they are taken for constants",
    )


def _reached(values: Sequence[Tensor], leaves: Iterable[Tensor]) -> list[Tensor]:
    """Those leaves that a gradient of the values reaches."""
    leaves, values = list(leaves), [value for value in values if value.requires_grad]
    if not leaves or not values:
        return []
    grads = torch.autograd.grad(values, leaves, allow_unused=True, retain_graph=True)
    return [leaf for leaf, g in zip(leaves, grads) if g is not None]


def _check_names(rule: UpdateRule, params: Params, hparams: Mapping[str, Tensor]) -> None:
    if not hparams:
        raise HypergradientError("hparams: found none, expected the tensors to differentiate by name")
    for name, h in hparams.items():
        if not isinstance(h, Tensor) or not h.is_floating_point():
            found = h.dtype if isinstance(h, Tensor) else type(h).__name__
            raise HypergradientError(f"hparams[{name!r}]: found {found}, expected a floating tensor")
    where = {str(p.device) for p in params.values()}
    for name, h in [*hparams.items(), *rule.named_parameters()]:
        if where and str(h.device) not in where:
            what = f"hparams[{name!r}]" if name in hparams else f"{type(rule).__name__}.{name}"
            raise HypergradientError(f"{what} is on {h.device}, params on {', '.join(sorted(where))}; move it there")
    own, given = dict(rule.named_parameters()), split(hparams)[1]
    for name, h in given.items():
        if name not in own:
            raise HypergradientError(
                f"hparams[{RULE + name!r}]: {type(rule).__name__} has no hyperparameter {name!r}; "
                f"{did_you_mean(name, own)}"
            )
        if h.shape != own[name].shape:
            raise HypergradientError(
                f"hparams[{RULE + name!r}]: found shape {list(h.shape)}, {type(rule).__name__} has "
                f"{list(own[name].shape)}"
            )
    for name, p in own.items():
        if p.requires_grad and name not in given:
            raise HypergradientError(
                f"{type(rule).__name__}.{name} requires grad but is not in hparams, so its gradient would be lost; "
                f"pass it as {RULE + name!r} (rule_hparams gives it), or make the rule with learnable=False"
            )


def _scalar(value: Any, what: str) -> Tensor:
    """The loss, once it is known to be a scalar."""
    if not isinstance(value, Tensor):
        raise HypergradientError(f"{what} gave {type(value).__name__}, expected a scalar tensor")
    if value.dim():
        raise HypergradientError(f"{what} gave a tensor {list(value.shape)}, expected a scalar; take its mean or sum")
    return value


def finished(
    value: Tensor,
    grads: Mapping[str, Tensor | None],
    hparams: Params,
    final_params: Params,
    state: Any,
    losses: Sequence[Tensor],
    warnings: Iterable[str] = (),
) -> Hypergradient:
    """The result, once it is known to be finite. losses: scalars, or vectors of several steps' (T small tensors take
    memory that grows with T). A gradient None is zero (``check_inputs`` has told why).

    Raises NonFiniteError, which names the first step at which the training had diverged.
    """
    found = {n: torch.zeros_like(h) if (g := grads[n]) is None else g.detach().to(h.dtype) for n, h in hparams.items()}
    device = value.device
    path = torch.cat([x.detach().reshape(-1) for x in losses]) if losses else torch.zeros(0, device=device)
    largest = torch.stack([g.abs().max() if g.numel() else g.sum() for g in found.values()]).max()
    if not bool(torch.isfinite(value.detach()) & torch.isfinite(largest) & torch.isfinite(path).all()):
        raise NonFiniteError(_diverged(value, path, found, state))
    return Hypergradient(value.detach(), found, constants(final_params), state, path, tuple(warnings))


def _diverged(value: Tensor, path: Tensor, grads: Params, state: Any) -> str:
    first = (getattr(state, "step", len(path)) or len(path)) - len(path)
    bad = (~torch.isfinite(path)).nonzero()
    if len(bad):
        at = int(bad[0])
        return (
            f"the inner training diverged: its loss is {float(path[at])} at step {first + at + 1} of "
            f"{first + len(path)} (it began at {float(path[0]):.4g}); lower its rates"
        )
    if not bool(torch.isfinite(value)):
        return f"the outer loss is {float(value)} after {first + len(path)} finite inner steps"
    name = next(name for name, g in grads.items() if not bool(torch.isfinite(g).all()))
    return (
        f"the hypergradient of {name!r} is not finite though every loss of the {len(path)} steps is; the training "
        "may be chaotic (lower its rates, or truncate)"
    )
