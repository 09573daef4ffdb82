"""What an environment is: the dynamics and rewards of a family of tasks, for many episodes at once."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor


class Step(NamedTuple):
    """What one step of E episodes led to.

    state: the environment's own, for the next step; observations: [E, O]; rewards: [E]; done: [E], boolean, true where
    the episode ended with this step. What episodes that ended before give is not looked at.
    """

    state: Any
    observations: Tensor
    rewards: Tensor
    done: Tensor


class Environment(Protocol):
    """A family of tasks that differ in their parameters, a row of P numbers an episode.

    Chance is drawn beforehand and is part of the parameters, so that an episode is a function of its parameters and
    actions. One written in torch operations alone runs on every engine; one that leaves torch, as a simulator does,
    only on those that run task by task.

    observation_size, action_size: O and A, the lengths of an observation and of an action.
    """

    name: str
    observation_size: int
    action_size: int

    def draw(self, rng: np.random.Generator, episodes: int) -> np.ndarray:
        """The parameters [episodes, P] of a new task's episodes."""
        ...

    def reset(self, parameters: Tensor) -> tuple[Any, Tensor]:
        """The first state and observations [E, O] of episodes with ``parameters`` [E, P]."""
        ...

    def step(self, state: Any, actions: Tensor, parameters: Tensor) -> Step:
        """Goes on by one step with ``actions`` [E, A] of any size, which are clipped to [-1, 1]."""
        ...
