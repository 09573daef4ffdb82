"""The linear systems of implicit hypergradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from metahpo.errors import HypergradientError, NetError
from metahpo.functional.trees import Params
from metahpo.inner.problem import InnerProblem, split
from metahpo.inner.rules.base import RuleState, UpdateRule
from metahpo.inner.rules.decay import loss_decays


@dataclass(frozen=True)
class System:
    """A v = g, with g the outer loss's gradient, by reverse mode over one kept graph.

    value: the inner loss; outputs, inputs: of a map with Jacobian J, a tensor of equal shape each; hparams: what the
    outputs depend on besides. is_update: whether the map is an update of (params, rule state), and A = I - J^T; else it
    is the inner gradient of the params, and A = J, symmetric.
    """

    value: Tensor
    outputs: Sequence[Tensor]
    inputs: Sequence[Tensor]
    hparams: Params
    is_update: bool

    def vector(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One vector [P] of a tensor for each input; None and the last ones, where too few, are zero."""
        padded = [*tensors, *[None] * (len(self.inputs) - len(tensors))]
        return torch.cat([(torch.zeros_like(x) if t is None else t).flatten() for t, x in zip(padded, self.inputs)])

    def distance(self, count: int) -> Tensor:
        """The size of what is zero at the end of a training: the first ``count`` outputs, or their moves."""
        pairs = list(zip(self.outputs, self.inputs))[:count]
        parts = [out - x if self.is_update else out for out, x in pairs]
        return torch.cat([part.detach().flatten() for part in parts]).norm()

    def product(self, v: Tensor) -> Tensor:
        """A v."""
        pulled = self.vector(self._pulled(v, self.inputs))
        return v - pulled if self.is_update else pulled

    def to_hparams(self, v: Tensor) -> dict[str, Tensor | None]:
        """What the solution adds to the gradient in each hyperparameter; None is zero."""
        found = self._pulled(v, list(self.hparams.values()))
        sign = 1 if self.is_update else -1
        return {name: t if t is None else sign * t for name, t in zip(self.hparams, found)}

    def _pulled(self, v: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
        parts = zip(self.outputs, v.split([x.numel() for x in self.inputs]))
        pairs = [(out, part.view_as(out).to(out.dtype)) for out, part in parts if out.requires_grad]
        if not pairs or not inputs:
            return [None] * len(inputs)
        outputs, seeds = zip(*pairs)
        return torch.autograd.grad(outputs, inputs, seeds, retain_graph=True, allow_unused=True)


def hessian_system(
    problem: InnerProblem,
    rule: UpdateRule,
    params: Params,
    hparams: Params,
    batches: Sequence[Any],
    step: int,
    carry: Any,
) -> System:
    """H v = g at params, with the Hessian of what the rule minimises: the mean inner loss over the batches, each at
    this carry, and its weight decay at the last of ``step`` steps."""
    value, slopes = minimised_slopes(problem, rule, params, hparams, batches, step, carry, create_graph=True)
    return System(value, slopes, list(params.values()), hparams, is_update=False)


def minimised_slopes(
    problem: InnerProblem,
    rule: UpdateRule,
    params: Params,
    hparams: Params,
    batches: Sequence[Any],
    step: int,
    carry: Any,
    create_graph: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """The mean inner loss over the batches, and the gradient of what the rule minimises, which has its weight decay
    besides, in each of params."""
    others, own = split(hparams)
    try:
        decays = loss_decays(rule, params, max(step - 1, 0), own)
    except NetError as error:
        raise HypergradientError(str(error)) from error
    value = mean_over_batches(problem, carry).loss(params, others, batches)
    found = torch.autograd.grad(value, list(params.values()), create_graph=create_graph, allow_unused=True)
    slopes = []
    for (name, p), slope in zip(params.items(), found):
        if slope is None:  # Which no rule moves.
            slopes.append(torch.zeros_like(p))
        else:
            slopes.append(slope + decays[name] * p if name in decays else slope)
    return value, slopes


def update_system(
    problem: InnerProblem,
    rule: UpdateRule,
    params: Params,
    hparams: Params,
    batches: Sequence[Any],
    state: RuleState,
    step: int,
    carry: Any,
) -> System:
    """(I - J^T) v = g at (params, state), with J the Jacobian of the rule's update on the mean inner loss."""
    leaves, spec = tree_flatten(state)
    leaves = [x.detach().requires_grad_() if _moves(x) else x for x in leaves]
    start = tree_unflatten(leaves, spec)
    end = mean_over_batches(problem, carry).fit(rule, params, hparams, [batches], state=start, step=step)
    outputs = [*(end.params[name] for name in params), *filter(_moves, tree_leaves(end.state))]
    inputs = [*params.values(), *filter(_moves, leaves)]
    before, after = ([list(x.shape) for x in xs] for xs in (inputs, outputs))
    if before != after:
        raise HypergradientError(
            f"FixedPoint: the state of {type(rule).__name__} changes its shapes at step {step + 1}, from {before} to "
            f"{after}, so no state is a fixed point; choose CG()"
        )
    return System(end.losses[0], outputs, inputs, hparams, is_update=True)


def mean_over_batches(problem: InnerProblem, carry: Any) -> InnerProblem:
    """The problem with the mean of the loss over a list of batches, at a carry that stays."""

    def loss(params: Params, hparams: Params, batches: Sequence[Any]) -> Tensor:
        return torch.stack([problem.value(params, hparams, batch, carry)[0] for batch in batches]).mean()

    return InnerProblem(loss)


def _moves(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
