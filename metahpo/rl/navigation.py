"""A point that walks to a goal it is not shown."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metahpo.rl.environment import Step

SPEED = 0.1
REACHED = 0.01


class Navigation:
    """2-D navigation (Finn et al. 2017, section 5.3): from the origin to a goal uniform in [-0.5, 0.5]^2.

    Observation: the position [2]. Action: the velocity in units of 0.1 a step, each component clipped to [-1, 1].
    Reward: minus the squared distance to the goal after the step. An episode ends within 0.01 of the goal. A task's
    parameters are its goal [2].
    """

    name = "navigation"
    observation_size = 2
    action_size = 2

    def draw(self, rng: np.random.Generator, episodes: int) -> np.ndarray:
        return np.tile(rng.uniform(-0.5, 0.5, 2), (episodes, 1))

    def reset(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        start = torch.zeros_like(parameters)
        return start, start

    def step(self, state: Tensor, actions: Tensor, parameters: Tensor) -> Step:
        position = state + SPEED * actions.clamp(-1, 1)
        squared = (position - parameters).square().sum(-1)
        return Step(position, position, -squared, squared < REACHED**2)


def best_return(goals: Tensor, horizon: int) -> Tensor:
    """The highest return [...] that an episode of ``horizon`` steps to ``goals`` [..., 2] can have.

    Components are apart in reward and speed, so each one goes straight to the goal at full speed and stays.
    """
    times = torch.arange(1, horizon + 1).to(goals)
    left = (goals.abs()[..., None] - SPEED * times).clamp(min=0)
    return -left.square().sum((-1, -2))
