"""Tasks of an environment."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np
import torch

from metahpo.checks import KnownKeywords, check_type, check_whole, refuse
from metahpo.errors import DataArgumentError
from metahpo.rl.environment import Environment
from metahpo.tasks.arguments import task_numbers
from metahpo.tasks.task import Task


class RolloutTasks(KnownKeywords):
    """A task is what E support and E query episodes of an environment leave to chance: noise and parameters.

    support_x: [E, H, A], the standard normal noise of a policy's actions in H steps; support_y: [E, P], the
    environment's parameters, which are one task's (a goal, a mass) and may hold an episode's own (a seed); the query
    set alike, of the same task. float32. Tasks are numbered, pure functions of (seed, split, number), and their
    parameters do not depend on the horizon.
    """

    keyword_error = DataArgumentError

    def __init__(
        self,
        environment: Environment,
        split: str = "train",
        *,
        episodes: int = 20,
        horizon: int = 100,
        seed: int = 0,
    ):
        if not all(hasattr(environment, name) for name in ("draw", "reset", "step", "action_size")):
            refuse(self, "environment", environment, "an Environment", DataArgumentError)
        self.environment = environment
        self.split = check_type(self, "split", split, str, error=DataArgumentError)
        self.episodes = check_whole(self, "episodes", episodes, at_least=1, error=DataArgumentError)
        self.horizon = check_whole(self, "horizon", horizon, at_least=1, error=DataArgumentError)
        self.seed = check_whole(self, "seed", seed, at_least=0, error=DataArgumentError)

    def task(self, index: int) -> Task:
        index = check_whole(self, "index", index, at_least=0, error=DataArgumentError)
        rng = np.random.default_rng([self.seed, crc32(self.split.encode()), index])
        count = self.episodes
        parameters = torch.as_tensor(self.environment.draw(rng, 2 * count), dtype=torch.float32)
        shape = (2 * count, self.horizon, self.environment.action_size)
        noise = torch.as_tensor(rng.standard_normal(shape, dtype=np.float32))
        return Task(noise[:count], parameters[:count], noise[count:], parameters[count:])

    def batch(self, indices: Sequence[int]) -> Task:
        tasks = [self.task(index) for index in task_numbers(self, indices)]
        return Task(*(torch.stack(parts) for parts in zip(*tasks)))
