"""Environments of gymnasium, with numbers of theirs drawn by task."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metahpo.checks import check_number, check_type, refuse
from metahpo.errors import ConfigArgumentError, ConfigError, NetError, one_line
from metahpo.functional.levels import under_torch_func
from metahpo.rl.environment import Step

# A seed is a column of float32 parameters, which holds whole numbers up to this one exactly.
SEEDS = 2**24
# Tasks of how many values of a varied number are compared, for at most how many steps.
_LOOKS, _STEPS = 5, 100


class Gym:
    """The environment ``id`` of gymnasium; each number in ``vary`` is set anew for every task.

    vary: attributes of the unwrapped environment, and the range that each is drawn from, uniformly. They must be such
    that the environment reads them at every step (Pendulum-v1: the mass ``m`` in kg, the length ``l`` in m, gravity
    ``g`` in m/s^2). options: arguments of ``gymnasium.make``. A task's parameters are those numbers, and a seed for
    each episode, from which the environment draws its first state. Actions of [-1, 1] are scaled to the environment's
    bounds; an episode that it truncates has ended.

    It is stepped episode by episode in Python, so it runs on the engines ``loop`` and ``threads`` alone.

    Raises ConfigError where gymnasium or what the environment needs is not installed, the environment is unknown, has
    no such number, or gives the same episodes whatever its value, and NetError where its actions are not a bounded
    vector of real numbers, or its observations no vector: a Gaussian policy cannot take it.
    """

    # Ends the error where the environment cannot be made.
    advice = ""

    def __init__(self, id: str, vary: Mapping[str, tuple[float, float]] | None = None, **options: Any):
        check_type(self, "id", id, str, "the name of an environment", error=ConfigArgumentError)
        vary = {} if vary is None else vary
        check_type(self, "vary", vary, Mapping, "a dict of (low, high) by attribute", error=ConfigArgumentError)
        for name, bounds in vary.items():
            if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
                refuse(self, f"vary[{name!r}]", bounds, "a pair (low, high)", ConfigArgumentError)
            low, high = (check_number(self, f"vary[{name!r}]", bound, error=ConfigArgumentError) for bound in bounds)
            if low > high:
                refuse(self, f"vary[{name!r}]", bounds, "low at most high", ConfigArgumentError)
        self.name, self.vary, self.options = id, dict(vary), options
        self._ready: dict[int, list[Any]] = {}
        probe = self._make()
        try:
            self.low, self.high = _action_bounds(probe.action_space, id)
            self.action_size = len(self.low)
            self.observation_size = _observation_size(probe.observation_space, id)
            for attribute in self.vary:
                _check_attribute(probe.unwrapped, attribute, id)
            self._check_tasks(probe)
        finally:
            probe.close()

    def _check_tasks(self, probe: Any) -> None:
        """Raises ConfigError for a number that an environment reads only as it is made, or not in all of its range."""
        middle = np.array([(low + high) / 2 for low, high in self.vary.values()])
        for place, (attribute, (low, high)) in enumerate(self.vary.items()):
            values = np.linspace(low, high, _LOOKS) if low < high else np.array([])
            tasks = np.tile(middle, (len(values), 1))
            tasks[:, place] = values
            try:
                episodes = [self._episode(probe, task) for task in tasks]
            except Exception:
                return  # What fails in a task is said where the task is run.
            for first, second, episode, other in zip(values, values[1:], episodes, episodes[1:]):
                if episode == other:
                    raise ConfigError(
                        f"data.vary.{attribute}: {first:.4g} and {second:.4g} give environment {self.name} the same "
                        f"episode of {len(episode)} steps, expected a number that it reads at every step, in a range "
                        "where it makes a difference"
                    )

    def _episode(self, probe: Any, task: np.ndarray) -> list[tuple[list[float], float]]:
        """The observations and rewards of some steps at the bounds of actions, the same for every task."""
        self.configure(probe.unwrapped, task)
        probe.reset(seed=0)
        rng, action, steps = np.random.default_rng(0), self.low, list[tuple[list[float], float]]()
        for step in range(_STEPS):
            if step % 10 == 0:  # Each for a while, so that things come to speed.
                action = np.where(rng.random(self.action_size) < 0.5, self.low, self.high)
            seen, reward, terminated, truncated, info = probe.step(action.astype(np.float32))
            steps.append((np.asarray(seen).tolist(), self.reward(float(reward), info, task)))
            if terminated or truncated:
                break
        return steps

    # What a family of tasks may override.

    def draw_task(self, rng: np.random.Generator) -> np.ndarray:
        """The numbers [P - 1] of a new task."""
        return np.array([rng.uniform(*bounds) for bounds in self.vary.values()])

    def configure(self, environment: Any, task: np.ndarray) -> None:
        """Makes the unwrapped ``environment`` that of the task with the numbers ``task`` [P - 1]."""
        for attribute, value in zip(self.vary, task):
            setattr(environment, attribute, float(value))

    def reward(self, reward: float, info: Mapping[str, Any], task: np.ndarray) -> float:
        """The reward of a step for which gymnasium gave ``reward`` and ``info``."""
        return reward

    # What the rollouts use.

    def draw(self, rng: np.random.Generator, episodes: int) -> np.ndarray:
        task = np.tile(self.draw_task(rng), (episodes, 1))
        return np.concatenate([task, rng.integers(SEEDS, size=(episodes, 1))], 1)

    def reset(self, parameters: Tensor) -> tuple[Any, Tensor]:
        if under_torch_func():
            raise NetError(
                f"environment {self.name} is stepped in Python, task by task, which engines vmap, trace and graph "
                "cannot; choose training.engine loop or threads"
            )
        rows = parameters.cpu().double().numpy()
        environments = self._environments(len(rows))
        seen = []
        for environment, row in zip(environments, rows):
            self.configure(environment.unwrapped, row[:-1])
            seen.append(environment.reset(seed=int(row[-1]))[0])
        return (environments, rows, np.zeros(len(rows), bool)), _tensor(seen, parameters)

    def step(self, state: Any, actions: Tensor, parameters: Tensor) -> Step:
        environments, rows, ended = state
        unit = actions.clamp(-1, 1).cpu().double().numpy()
        torques = (self.low + (unit + 1) / 2 * (self.high - self.low)).astype(np.float32)
        seen, rewards = np.zeros((len(rows), self.observation_size)), np.zeros(len(rows))
        done = ended.copy()
        for e in np.flatnonzero(~ended):
            seen[e], reward, terminated, truncated, info = environments[e].step(torques[e])
            rewards[e] = self.reward(float(reward), info, rows[e, :-1])
            done[e] = terminated or truncated
        ends = torch.as_tensor(done, device=parameters.device)
        return Step((environments, rows, done), _tensor(seen, parameters), _tensor(rewards, parameters), ends)

    def __deepcopy__(self, memo: dict[int, Any]) -> Gym:
        """Itself: the copies of a learner that threads work with may share it, as each thread has its environments."""
        return self

    def _environments(self, count: int) -> list[Any]:
        """This thread's first ``count`` environments; made once, as some take long to make."""
        ready = self._ready.setdefault(threading.get_ident(), [])
        while len(ready) < count:
            ready.append(self._make())
        return ready[:count]

    def _make(self) -> Any:
        try:
            import gymnasium
        except ImportError as error:
            raise ConfigError(
                f'data.source gym needs gymnasium: pip install "metahpo[rl]" ({one_line(error)})'
            ) from None
        try:
            return gymnasium.make(self.name, disable_env_checker=True, **self.options)
        except (gymnasium.error.Error, ImportError, TypeError) as error:
            raise ConfigError(
                f"gymnasium cannot make environment {self.name!r}: {one_line(error)}{self.advice}"
            ) from error


def _action_bounds(space: Any, id: str) -> tuple[np.ndarray, np.ndarray]:
    from gymnasium.spaces import Box

    flat = isinstance(space, Box) and len(space.shape) == 1 and np.issubdtype(space.dtype, np.floating)
    if not flat or not space.is_bounded("both"):
        raise NetError(
            f"environment {id}: its action space is {one_line(space)}, expected a Box of one dimension, of real "
            "numbers with bounds: the policy is Gaussian"
        )
    return space.low.astype(float), space.high.astype(float)


def _observation_size(space: Any, id: str) -> int:
    from gymnasium.spaces import Box

    if not isinstance(space, Box) or len(space.shape) != 1:
        raise NetError(
            f"environment {id}: its observation space is {one_line(space)}, expected a Box of one dimension, which the "
            "policy's net takes"
        )
    return space.shape[0]


def _check_attribute(environment: Any, attribute: str, id: str) -> None:
    value, found = getattr(environment, attribute, None), None
    if value is None:
        found = "has no attribute of that name"
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        found = f"has {one_line(value, 60)!r} there"
    else:
        try:
            setattr(environment, attribute, value)
        except AttributeError:
            found = "does not let it be set"
    if found:
        raise ConfigError(f"data.vary.{attribute}: should be a number of environment {id}, which {found}")


def _tensor(values: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(np.asarray(values), dtype=like.dtype, device=like.device)
