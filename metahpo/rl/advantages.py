"""How much better than expected each action of some episodes was."""

from __future__ import annotations

import torch
from torch import Tensor

from metahpo.rl.rollout import Rollout

RIDGE = 1e-5


def discounted_sums(values: Tensor, discount: float) -> Tensor:
    """The sums over k >= t of discount^(k - t) * values[..., k], [..., H]."""
    times = torch.arange(values.shape[-1], device=values.device)
    ahead = times - times[:, None]
    base = torch.as_tensor(discount, dtype=torch.float64, device=values.device)
    weights = torch.where(ahead >= 0, base ** ahead.clamp(min=0), 0.0)
    return values @ weights.T.to(values)


def features(rollout: Rollout) -> Tensor:
    """What the baseline is linear in, [E, H, 2 O + 4]: observations and their squares, three powers of time, and 1
    (Duan et al. 2016, appendix: o, o^2, 0.01 t, (0.01 t)^2, (0.01 t)^3, 1)."""
    seen = rollout.observations
    time = 0.01 * torch.arange(seen.shape[1]).to(seen)
    powers = torch.stack([time, time**2, time**3, torch.ones_like(time)], -1)
    return torch.cat([seen, seen.square(), powers.expand(len(seen), -1, -1)], -1)


def linear_baseline(rollout: Rollout, targets: Tensor) -> Tensor:
    """The values [E, H] of the ridge regression of ``targets`` [E, H] on ``features``, over the steps taken."""
    x = (features(rollout) * rollout.taken[..., None]).double()
    flat, y = x.flatten(0, 1), (targets * rollout.taken).double().flatten()
    # By normal equations, which batch well; float64 makes up for their squared condition number.
    gram = flat.T @ flat + RIDGE * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(gram, flat.T @ y)
    return (x @ weights).to(targets)


@torch.no_grad()
def advantages(rollout: Rollout, discount: float, gae: float) -> Tensor:
    """Generalised advantage estimates [E, H] (Schulman et al. 2016, equation 16), zero after an episode's end.

    The value function is ``linear_baseline`` fitted to these episodes' own discounted returns. gae: lambda; with 1 they
    are discounted returns less the baseline. Scaled to mean 0 and deviation 1 over the steps taken.
    """
    taken = rollout.taken
    values = linear_baseline(rollout, discounted_sums(rollout.rewards, discount)) * taken
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    found = discounted_sums(rollout.rewards + discount * following - values, discount * gae)
    count = taken.sum()
    centred = (found - (found * taken).sum() / count) * taken
    return centred / (centred.square().sum() / count).sqrt().clamp(min=1e-8)
