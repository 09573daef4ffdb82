"""iMAML: MAML by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metahpo.checks import check_number, check_whole
from metahpo.errors import NetArgumentError, shown
from metahpo.functional import Params
from metahpo.functional.levels import under_torch_func
from metahpo.functional.trees import map_tree
from metahpo.inner import ConjugateGradients, FirstOrder, Reverse, UpdateRule, unroll
from metahpo.inner.gradient import zeros_for_unused
from metahpo.inner.linear_solve import correction
from metahpo.inner.randomness import same_draws
from metahpo.inner.rules.curvature import flat, hessian_product, split
from metahpo.learners.base import Adapted, Loss
from metahpo.learners.maml import INNER_LR, MAML
from metahpo.learners.phase import Phase

# (weights w, what the outer loop learns) -> inner loss.
Objective = Callable[[Params, Any], Tensor]


class IMAML(MAML):
    """Learns initial weights theta to which a task's weights are drawn: w = argmin L(w) + strength/2 |w - theta|^2; the
    outer gradient is that of the minimum, (I + H/strength)^-1 times the query loss's (Rajeswaran et al. 2019, equation
    6 and algorithm 2), H the Hessian of the support loss.

    net, loss: as in ``MAML``. steps, inner_lr: of the gradient descent to the minimum, or ``rule`` in its place.
    strength: lambda of the paper. cg_steps: products with the Hessian in the solution of the linear system; 0 leaves it
    out (w - theta is taken as a constant). The memory is free of the number of steps. Exact where the descent converged
    and the system was solved; what the outer loop alone learns (batch-norm scales) gets its implicit gradient too.

    Of the improvements of MAML++ none makes sense but the outer rate's annealing: the path to the minimum does not
    count, so there is nothing to weight, anneal or learn by step.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        steps: int = 16,
        inner_lr: float = INNER_LR,
        strength: float = 2.0,
        cg_steps: int = 5,
        loss: Loss = F.cross_entropy,
        adapt_norms: bool = False,
        rule: UpdateRule | None = None,
    ):
        try:
            strength = check_number(self, "strength", strength, above=0)
            cg_steps = check_whole(self, "cg_steps", cg_steps, at_least=0)
        except ValueError:
            found = f"{shown(strength)} and {shown(cg_steps)}"
            raise NetArgumentError(f"iMAML needs strength > 0 and cg_steps >= 0, found {found}") from None
        super().__init__(net, steps=steps, inner_lr=inner_lr, loss=loss, adapt_norms=adapt_norms, rule=rule)
        self.strength, self.cg_steps = strength, cg_steps

    def adapt(self, support_x: Tensor, support_y: Tensor, phase: Phase) -> Adapted:
        start = self.initial(phase)
        learnt = (start.params, {n: p for n, p in self.module.params().items() if n not in start.params})

        def inner_loss(params: Params, buffers: Params, batch: tuple[Params, Params], step: int):
            anchor, others = batch
            outputs, new = self.module.apply_with(
                {**params, **others}, buffers, support_x, step=step, training=phase.training
            )
            away = torch.stack([(params[name] - anchor[name]).square().sum() for name in params]).sum()
            return self.loss(outputs, support_y) + self.strength / 2 * away, new

        end = unroll(
            inner_loss,
            self.rule,
            map_tree(torch.detach, start.params),
            repeat(learnt, self.steps),
            carry=start.buffers,
            gradient=FirstOrder(),
            keep_steps=False,
        )
        params = map_tree(torch.detach, end.params)
        if torch.is_grad_enabled():
            # With the buffers that the descent left, as the minimum is one of the loss with these.
            buffers = map_tree(torch.detach, end.carry)
            change = self._implicit(lambda w, learnt: inner_loss(w, buffers, learnt, 0)[0], params, learnt)
            params = {name: p + change[name] for name, p in params.items()}
        return Adapted(params, phase, end.carry, (params,))

    def _implicit(self, objective: Objective, at: Params, learnt: Any) -> Params:
        """Zero by name, with the minimum's derivative in what the outer loop learns."""
        if not self.cg_steps:
            return {name: p - p.detach() for name, p in learnt[0].items()}

        # Of one function: with dropout the slope and every product with the Hessian see the same mask.
        objective = same_draws(objective, [*at.values()])

        def products(learnt: Any) -> Callable[[Tensor], Tensor]:
            return _products(lambda w: objective(w, learnt), at)

        slope, *_ = Reverse()(lambda w, carry, batch, step: (objective(w, batch), carry), at, None, learnt, 0)
        slope = zeros_for_unused(slope, at)
        solver = ConjugateGradients(self.cg_steps, truncate=True)
        return split(correction(products, learnt, -flat(slope, at), solver), at)


def _products(function: Callable[[Params], Tensor], at: Params) -> Callable[[Tensor], Tensor]:
    """Products of vectors [n] with the Hessian of ``function`` at ``at``."""
    if under_torch_func():
        return lambda v: flat(hessian_product(function, at, split(v, at)), at)
    # The gradient's graph serves them all.
    with torch.enable_grad():
        here = {name: p.detach().requires_grad_() for name, p in at.items()}
        leaves = list(here.values())
        slope = torch.cat([g.reshape(-1) for g in torch.autograd.grad(function(here), leaves, create_graph=True)])

    def product(v: Tensor) -> Tensor:
        parts = torch.autograd.grad(slope, leaves, v, retain_graph=True, materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in parts])

    return product
