"""L-BFGS."""

from __future__ import annotations

import torch
from torch import Tensor

from metahpo.checks import check_whole
from metahpo.errors import NetArgumentError
from metahpo.functional.trees import Params
from metahpo.inner.rules.base import RuleState, UpdateRule
from metahpo.inner.rules.curvature import flat, split

# As torch.optim.LBFGS.
LEAST_CURVATURE = 1e-10


class LBFGS(UpdateRule):
    """w <- w - lr * B g, B the inverse Hessian that the last ``history`` changes of parameters and gradient imply
    (limited memory BFGS by the two-loop recursion, Nocedal and Wright 2006, algorithms 7.4 and 7.5), as
    ``torch.optim.LBFGS`` with one iteration a step and no line search; as there the first step is lr * min(1, 1 /
    |g|_1) * g.

    lr: a hyperparameter; learnable: whether the outer loop learns it. A pair whose s.y is not above 1e-10 (no positive
    curvature) is not taken. The gradients should be of one loss: batches that differ look like curvature.

    Raises NetError for a history below 1.
    """

    lr: Tensor

    def __init__(self, lr: float = 1.0, history: int = 10, *, learnable: bool = False):
        super().__init__()
        history = check_whole(self, "history", history, at_least=1, error=NetArgumentError)
        self.history = history
        self.add_scalars(learnable, lr=lr)

    def init(self, params: Params) -> RuleState:
        zero = torch.zeros_like(flat(params, params))
        pairs = zero.new_zeros(self.history, zero.numel())
        return {"grad": zero, "change": zero, "s": pairs, "y": pairs, "scale": zero.new_ones(())}

    def forward(self, params: Params, grads: Params, state: RuleState, step: int) -> tuple[Params, RuleState]:
        g = flat(grads, params)
        if step == 0:
            size = g.abs().sum()
            change = -self.lr * g / torch.where(size > 1, size, 1.0)
            state = {**state, "grad": g, "change": change}
        else:
            s, y, scale = _with_pair(state, state["change"], g - state["grad"])
            change = -self.lr * _two_loops(s, y, scale, g, min(step, self.history))
            state = {"grad": g, "change": change, "s": s, "y": y, "scale": scale}
        parts = split(change, params)
        return {name: p + parts[name] for name, p in params.items()}, state


def _with_pair(state: RuleState, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The history, the oldest pair first, with the new one in place of the oldest if its curvature is positive."""
    curvature = s @ y
    taken = curvature > LEAST_CURVATURE
    scale = torch.where(taken, curvature / torch.where(taken, y @ y, 1.0), state["scale"])
    stacks = [torch.cat([state[key][1:], new[None]]) for key, new in (("s", s), ("y", y))]
    return *(torch.where(taken, new, state[key]) for key, new in zip("sy", stacks)), scale  # type: ignore[return-value]


def _two_loops(s: Tensor, y: Tensor, scale: Tensor, g: Tensor, count: int) -> Tensor:
    """B g by the last ``count`` pairs; one that is zero, not there yet, changes nothing."""
    curvature = (s * y).sum(1)
    inverse = torch.where(curvature > 0, 1 / torch.where(curvature > 0, curvature, 1.0), 0.0).unbind()
    pairs = list(zip(s.unbind(), y.unbind(), inverse))[-count:]
    weights = []
    for s_i, y_i, rho in reversed(pairs):
        weights.append(rho * (s_i @ g))
        g = g - weights[-1] * y_i
    g = scale * g
    for (s_i, y_i, rho), weight in zip(pairs, reversed(weights)):
        g = g + (weight - rho * (y_i @ g)) * s_i
    return g
