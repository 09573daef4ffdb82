"""From a config to an environment."""

from __future__ import annotations

from metahpo.config import RunConfig
from metahpo.config_data import GymSettings, RolloutSettings
from metahpo.config_learners import CustomLearner, PolicyMAMLSettings
from metahpo.errors import ConfigError
from metahpo.rl import Environment, Gym, HalfCheetahDirection, HalfCheetahVelocity, Navigation

FAMILIES = {"half_cheetah_velocity": HalfCheetahVelocity, "half_cheetah_direction": HalfCheetahDirection}


def environment_of(config: RunConfig) -> Environment | None:
    """The environment whose episodes a run's tasks are; None where the tasks are no episodes.

    Raises ConfigError where the data and the learner do not belong together.
    """
    data, learner = config.data, config.learner
    acts = isinstance(learner, PolicyMAMLSettings)
    if not isinstance(data, RolloutSettings):
        if acts:
            raise ConfigError(f"data.source: found {data.source}, expected navigation or gym for learner policy_maml")
        return None
    if not acts and not isinstance(learner, CustomLearner):
        raise ConfigError(
            f"learner.name: found {learner.name}, expected policy_maml for data.source {config.data.source}"
        )
    if acts and data.episodes % learner.steps:
        raise ConfigError(
            f"data.episodes: found {data.episodes}, expected a multiple of learner.steps, {learner.steps}: each step "
            "takes its share"
        )
    return _gym(data) if isinstance(data, GymSettings) else Navigation()


def _gym(data: GymSettings) -> Gym:
    if data.environment not in FAMILIES:
        if not data.vary:
            raise ConfigError(f"data.vary: is empty, so all tasks of environment {data.environment} would be the same")
        return Gym(data.environment, data.vary)
    if data.vary:
        raise ConfigError(f"data.vary: {data.environment} has its own tasks; take it out")
    return FAMILIES[data.environment]()
