"""The half-cheetah that is to run at a velocity, or in a direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from metahpo.rl.gym import Gym


class HalfCheetah(Gym):
    """MuJoCo's HalfCheetah-v5 with the control cost of Finn et al. 2017, 0.05 |a|^2 a step; needs ``mujoco``."""

    advice = '; it needs pip install "gymnasium[mujoco]"'

    def __init__(self) -> None:
        super().__init__("HalfCheetah-v5", ctrl_cost_weight=0.05)

    def configure(self, environment: Any, task: np.ndarray) -> None:
        """A task changes the reward alone."""


class HalfCheetahVelocity(HalfCheetah):
    """Reward: minus the distance of the velocity from the task's, uniform in [0, 2] m/s, less the control cost (Finn et
    al. 2017, section 5.3)."""

    def draw_task(self, rng: np.random.Generator) -> np.ndarray:
        return rng.uniform(0, 2, 1)

    def reward(self, reward: float, info: Mapping[str, Any], task: np.ndarray) -> float:
        return float(-abs(info["x_velocity"] - task[0]) + info["reward_ctrl"])


class HalfCheetahDirection(HalfCheetah):
    """Reward: the velocity forwards or, in half of the tasks, backwards, less the control cost (Finn et al. 2017,
    section 5.3)."""

    def draw_task(self, rng: np.random.Generator) -> np.ndarray:
        return rng.choice([-1.0, 1.0], 1)

    def reward(self, reward: float, info: Mapping[str, Any], task: np.ndarray) -> float:
        return float(task[0] * info["x_velocity"] + info["reward_ctrl"])
