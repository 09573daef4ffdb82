"""What every hypergradient strategy takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from metahpo.errors import HypergradientError, NetError, NonFiniteError, did_you_mean
from metahpo.functional.formulas import ByFormula
from metahpo.functional.second_order import check_graph, second_derivatives
from metahpo.functional.swap import call_with
from metahpo.functional.trees import Params
from metahpo.inner.explicit import explicit
from metahpo.inner.problem import RULE, InnerProblem, split
from metahpo.inner.randomness import python_draws_kept
from metahpo.inner.rules.base import RuleState, UpdateRule

OuterLoss = Callable[[Params, Params], Tensor]


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
    """Where an inner training stands: the rule's state, the number of steps taken, and a strategy's own memory."""

    rule: RuleState
    step: int
    memory: Any = None


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
        """Trains from ``params`` for one step a batch, then differentiates ``outer_loss(final params, hparams)``.

        hparams: by name, floating; those of the rule as "rule.NAME", which the two losses do not get. state: of an
        earlier Hypergradient by this strategy, whose ``final_params`` go with it.

        Raises HypergradientError for a captured hyperparameter, a loss that is no scalar, a name that the rule does
        not have; NonFiniteError where the training diverges.
        """
        ...


def leaves(hparams: Mapping[str, Tensor]) -> Params:
    """The hyperparameters as the start of a graph of their own."""
    return {name: h.detach().requires_grad_() for name, h in hparams.items()}


def constants(tree: Any) -> Any:
    """The same tree of tensors cut from its graph."""
    return tree_map_only(Tensor, torch.detach, tree)


def outer_value(outer_loss: OuterLoss, params: Params, hparams: Params) -> Tensor:
    """``outer_loss`` with the hyperparameters that are not the rule's."""
    with ByFormula():
        return outer_loss(params, split(hparams)[0])


@contextmanager
def twice_differentiated(
    problem: InnerProblem,
    outer_loss: OuterLoss,
    params: Params,
    hparams: Params,
    batch: Any,
    instead: str,
    look: bool,
) -> Iterator[None]:
    """Inside it a layer without a second derivative is named, and what needs none is told (``instead``).

    look: whether to look beforehand for layers whose second derivative torch takes for zero, without an error.
    """

    def forward() -> None:
        problem.loss(params, split(hparams)[0], batch)
        outer_value(outer_loss, params, hparams)

    with second_derivatives(forward, instead):
        if look:
            check_graph(_slope(problem, params, hparams, batch), forward, instead)
        yield


@torch.enable_grad()
def _slope(problem: InnerProblem, params: Params, hparams: Params, batch: Any) -> Tensor:
    """A scalar that depends on the whole inner gradient; the random numbers that it draws can be drawn again."""
    here = leaves(params)
    devices = {p.device for p in here.values() if p.is_cuda}
    with torch.random.fork_rng(devices=devices), python_draws_kept():
        value = problem.loss(here, constants(split(hparams)[0]), batch)
    grads = torch.autograd.grad(value, list(here.values()), create_graph=True, allow_unused=True)
    return torch.stack([g.abs().sum() for g in grads if g is not None]).sum()


def check_inputs(
    problem: InnerProblem,
    rule: UpdateRule,
    outer_loss: OuterLoss,
    params: Params,
    hparams: Params,
    batches: Sequence[Any],
    state: Any = None,
) -> tuple[str, ...]:
    """Raises HypergradientError for what would be silently wrong; returns a warning for each unused hyperparameter.

    Where a ``state`` is given an earlier call has looked, and nothing is done. The look costs about one step.
    """
    if state is not None:
        return ()
    _check_names(rule, params, hparams)
    if not batches:
        raise HypergradientError("batches: found none, expected one for each inner step")
    with torch.enable_grad():
        params, given = leaves(params), leaves(hparams)
        others, own = split(given)
        inner = _scalar(problem.loss, "the inner loss", params, others, batches[0])
        outer = _scalar(outer_loss, "the outer loss", params, others)
        if not _reached([inner], params.values()):
            raise HypergradientError(
                "the inner loss does not depend on params (or cuts them from their graph), so there is nothing to train"
            )
        used = _reached([inner, outer], others.values())
        used += own.values()  # Every rule uses its own, if not in every step.
        if not rule.needs_loss and type(rule).forward is not UpdateRule.forward:
            _check_rule(rule, own, inner, params)
        lost = not _reached([outer], [*params.values(), *others.values()])
    warnings = [
        f"hyperparameter {name!r}: neither the losses nor the rule use it; its gradient is zero"
        for name, h in given.items()
        if not any(h is u for u in used)
    ]
    if lost:
        warnings.append(
            "the outer loss has no derivative in params nor in hparams (an accuracy, or cut from its graph), so every "
            "gradient that is had by differentiating it is zero"
        )
    return tuple(warnings)


def _check_rule(rule: UpdateRule, own: Params, inner: Tensor, params: Params) -> None:
    """Raises HypergradientError if the rule's first step computes with a captured tensor that requires grad."""
    found = torch.autograd.grad(inner, list(params.values()), retain_graph=True, materialize_grads=True)
    with torch.no_grad():
        state = rule.init(constants(params))

    def update(own: Params, params: Params, grads: Params, state: RuleState) -> Params:
        return call_with(rule, own, (params, grads, state, 0))[0]

    try:
        explicit(update, "the update rule", "in hparams")(own, params, dict(zip(params, found)), state)
    except NetError as error:
        raise HypergradientError(str(error)) from error


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


def _scalar(loss: Callable[..., Tensor], what: str, *arguments: Any) -> Tensor:
    try:
        value = explicit(loss, what, "in hparams")(*arguments)
    except NetError as error:
        raise HypergradientError(str(error)) from error
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
    found = {n: torch.zeros_like(h) if (g := grads[n]) is None else g.detach() for n, h in hparams.items()}
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
