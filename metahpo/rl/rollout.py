"""Episodes of a policy in an environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metahpo.rl.environment import Environment

# Observations [E, O] to the means [E, A] and logarithms of deviations [A] of actions.
Policy = Callable[[Tensor], tuple[Tensor, Tensor]]


class Rollout(NamedTuple):
    """E episodes of at most H steps; constants to every gradient.

    observations: [E, H, O], before each step; actions: [E, H, A]; rewards: [E, H]; taken: [E, H], 1 for the steps up
    to the end, that one included, and 0 after it. After an episode's end observations and rewards are zero.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    taken: Tensor

    def returns(self) -> Tensor:
        """The undiscounted return of each episode, [E]."""
        return self.rewards.sum(-1)


@torch.no_grad()
def roll_out(environment: Environment, policy: Policy, noise: Tensor, parameters: Tensor) -> Rollout:
    """Runs an episode for each row of ``noise`` [E, H, A], standard normal, and ``parameters`` [E, P].

    The actions are mean + deviation * noise: all chance is in the arguments. Nothing here is differentiated, whatever
    the environment is made of: a policy gradient knows the dynamics by their outcomes alone.
    """
    state, seen = environment.reset(parameters)
    taken = torch.ones_like(noise[:, 0, 0])
    steps = []
    for z in noise.unbind(1):
        mean, log_std = policy(seen)
        action = mean + log_std.exp() * z
        after = environment.step(state, action, parameters)
        steps.append((seen, action, torch.where(taken > 0, after.rewards, 0.0), taken))
        taken = torch.where(after.done, 0.0, taken)
        # What comes after an end may be NaN, which no weight of zero takes away.
        state, seen = after.state, torch.where(taken[:, None] > 0, after.observations, 0.0)
    # A tangent of forward mode passes no_grad.
    return Rollout(*(torch.stack(parts, 1).detach() for parts in zip(*steps)))
