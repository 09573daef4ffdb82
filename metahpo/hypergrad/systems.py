"""The linear systems of implicit hypergradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from metahpo.errors import HypergradientError
from metahpo.functional.trees import Params
from metahpo.inner.problem import InnerProblem, split
from metahpo.inner.rules.base import RuleState, UpdateRule


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
    problem: InnerProblem, params: Params, hparams: Params, batches: Sequence[Any], carry: Any
) -> System:
    """H v = g at params, with the Hessian of the mean inner loss over the batches, each at this carry."""
    others = split(hparams)[0]
    inputs = list(params.values())
    value = _mean(problem, carry).loss(params, others, batches)
    grads = torch.autograd.grad(value, inputs, create_graph=True, materialize_grads=True)
    return System(value, grads, inputs, others, is_update=False)


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
    end = _mean(problem, carry).fit(rule, params, hparams, [batches], state=start, step=step)
    outputs = [*(end.params[name] for name in params), *filter(_moves, tree_leaves(end.state))]
    inputs = [*params.values(), *filter(_moves, leaves)]
    before, after = ([list(x.shape) for x in xs] for xs in (inputs, outputs))
    if before != after:
        raise HypergradientError(
            f"FixedPoint: the state of {type(rule).__name__} changes its shapes at step {step + 1}, from {before} to "
            f"{after}, so no state is a fixed point; choose CG()"
        )
    return System(end.losses[0], outputs, inputs, hparams, is_update=True)


def _mean(problem: InnerProblem, carry: Any) -> InnerProblem:
    """The problem with the mean of the loss over a list of batches, at a carry that stays."""

    def loss(params: Params, hparams: Params, batches: Sequence[Any]) -> Tensor:
        return torch.stack([problem.value(params, hparams, batch, carry)[0] for batch in batches]).mean()

    return InnerProblem(loss)


def _moves(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
