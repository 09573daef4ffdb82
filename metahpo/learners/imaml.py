"""iMAML: MAML by the implicit function theorem."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metahpo.checks import check_number, check_whole
from metahpo.errors import NetArgumentError, shown
from metahpo.functional import Params
from metahpo.functional.levels import levels, under_torch_func
from metahpo.functional.trees import map_tree
from metahpo.inner import FirstOrder, Reverse, UpdateRule, unroll
from metahpo.inner.gradient import InnerLoss, zeros_for_unused
from metahpo.inner.linear_solve import correction, damped_solve
from metahpo.inner.randomness import readable, repeatable, same_draws
from metahpo.inner.rules.curvature import flat, hessian_product, split
from metahpo.inner.rules.decay import half_square, loss_decays
from metahpo.learners.base import Adapted, Loss
from metahpo.learners.maml import INNER_LR, MAML
from metahpo.learners.phase import Phase

# The part of the first inner gradient that may be left at the end.
_SMALL = 0.2


class IMAML(MAML):
    """Learns initial weights theta to which a task's weights are drawn: w = argmin L(w) + strength/2 |w - theta|^2; the
    outer gradient is that of the minimum, (I + H/strength)^-1 times the query loss's (Rajeswaran et al. 2019, equation
    6 and algorithm 2), H the Hessian of the support loss.

    net, loss: as in ``MAML``. steps, inner_lr: of the gradient descent to the minimum, or ``rule`` in its place.
    strength: lambda of the paper. cg_steps: products with the Hessian in the solution of the linear system; 0 leaves it
    out (w - theta is taken as a constant). The memory is free of the number of steps. Exact where the descent converged
    and the system was solved; what the outer loop alone learns (batch-norm scales) gets its implicit gradient too. A
    rule's weight decay is part of the system; one that is taken off the parameters (``AdamW``) raises NetError.

    A warning tells of an inner gradient that the descent has not brought below a fifth, and of negative curvature,
    where the system is damped until there is none: there the inner loop ends at no minimum.

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
        loss_decays(self.rule, self.module.params(), self.steps - 1)  # Refuses decoupled ones.

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

        first = _First()
        end = unroll(
            inner_loss,
            self.rule,
            map_tree(torch.detach, start.params),
            repeat(learnt, self.steps),
            carry=start.buffers,
            gradient=first,
            keep_steps=False,
        )
        params = map_tree(torch.detach, end.params)
        if torch.is_grad_enabled():
            # With the buffers that the descent left, as the minimum is one of the loss with these.
            buffers = map_tree(torch.detach, end.carry)

            def minimised(params: Params, carry: None, batch: tuple[tuple[Params, Params], Params], step: int):
                learnt, decays = batch
                return inner_loss(params, buffers, learnt, 0)[0] + half_square(params, decays), carry

            decays = loss_decays(self.rule, start.params, self.steps - 1)
            begin = flat(zeros_for_unused(first.grads, params), params)
            change = self._implicit(minimised, params, (learnt, decays), begin)
            params = {name: p + change[name] for name, p in params.items()}
        return Adapted(params, phase, end.carry, (params,))

    def _implicit(self, objective: InnerLoss, at: Params, batch: Any, start: Tensor) -> Params:
        """Zero by name, with the minimum's derivative in what the outer loop learns.

        objective: what the inner loop minimises; its batch: (what the outer loop learns, the rule's weight decays);
        start: the loss's gradient where the inner loop began.
        """
        anchor = batch[0][0]
        if not self.cg_steps:
            return {name: p - p.detach() for name, p in anchor.items()}

        # Of one function: with dropout the slope and every product with the Hessian see the same mask.
        objective = repeatable(same_draws(objective, [*at.values()]), "draw them from torch's generator")

        def products(batch: Any) -> Callable[[Tensor], Tensor]:
            return _products(lambda w: objective(w, None, batch, 0)[0], at)

        slopes, *_ = Reverse()(objective, at, None, batch, 0)
        slope = flat(zeros_for_unused(slopes, at), at)
        self._check_minimum(slope, start)
        return split(correction(products, batch, -slope, self._solve), at)

    def _solve(self, product: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
        x, damping = damped_solve(product, b, self.cg_steps)
        if readable(damping) and bool((_innermost(damping) > 0).any()):
            warnings.warn(
                "iMAML: negative curvature where the inner loop ends, which is therefore no minimum; the linear system "
                f"was damped by about {float(_innermost(damping).max()):.0e}, and the outer gradient is approximate. A "
                f"larger strength (now {self.strength:g}), more steps or a lower inner_lr help",
                stacklevel=2,
            )
        return x

    def _check_minimum(self, end: Tensor, start: Tensor) -> None:
        """Warns where the inner gradient at the end is no small part of that at the start."""
        if not readable(end):
            return
        sizes = [_innermost(slope).detach().norm(dim=-1) for slope in (end, start)]
        ratio = float((sizes[0] / sizes[1].clamp(min=torch.finfo(end.dtype).eps ** 0.5)).max())
        if ratio > _SMALL:
            # One digit, so that Python does not say it again and again.
            warnings.warn(
                f"iMAML: the inner gradient at the end is up to {ratio:.0e} of that at the start, but the outer "
                "gradient is that of a minimum; take more steps or another inner_lr",
                stacklevel=2,
            )


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


class _First(FirstOrder):
    """``FirstOrder`` that keeps the gradient of the first step."""

    def __call__(self, loss: InnerLoss, params: Params, carry: Any, batch: Any, step: int):
        result = super().__call__(loss, params, carry, batch, step)
        if step == 0:
            object.__setattr__(self, "grads", result[0])
        return result


def _innermost(tensor: Tensor) -> Tensor:
    """The tensor's numbers, of all tasks under ``vmap``."""
    *_, value = levels(tensor)
    return value
