"""From the section ``learner`` of a config to the learner of a run."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

from metahpo import learners
from metahpo.building_net import build_net, build_policy_net, check_net, outputs_of
from metahpo.config import RunConfig
from metahpo.config_data import RolloutSettings
from metahpo.config_episodes import EpisodeSettings
from metahpo.config_learners import CustomLearner, LinearHeadSettings, ProtoNetSettings
from metahpo.custom import call
from metahpo.errors import ConfigError
from metahpo.inner import Mixed, Reverse, named_remat
from metahpo.learners import Improvements, MetaLearner
from metahpo.rl import Environment
from metahpo.tasks import Episodes, Task, TaskSource
from metahpo.training.environment import seeded

LEARNERS: dict[str, type[MetaLearner]] = {
    "maml": learners.MAML,
    "maml_pp": learners.MAMLPlusPlus,
    "anil": learners.ANIL,
    "boil": learners.BOIL,
    "meta_sgd": learners.MetaSGD,
    "meta_curvature": learners.MetaCurvature,
    "warp_maml": learners.WarpMAML,
    "cavia": learners.CAVIA,
    "imaml": learners.IMAML,
    "reptile": learners.Reptile,
    "proto_net": learners.ProtoNet,
    "linear_head": learners.LinearHead,
}
SWITCHES = tuple(Improvements.__dataclass_fields__)


def build_learner(config: RunConfig, tasks: dict[str, TaskSource]) -> MetaLearner:
    """The learner for those tasks (of any split), its net initialised from the config's seed.

    Raises NetError if the net cannot take the inputs or its output does not fit the targets, ConfigError if the learner
    does not fit the data.
    """
    if isinstance(config.data, RolloutSettings):
        return _policy(config, next(iter(tasks.values())).environment)  # type: ignore[attr-defined]
    example = _widest(config, _example(config, tasks))
    regression = example.query_y.is_floating_point()
    loss = F.mse_loss if regression else F.cross_entropy
    settings = config.learner
    with seeded(config.training.seed):
        net = build_net(config.net, example)
        check_net(net, example, config.net.name)
        if isinstance(settings, CustomLearner):
            return _own(settings, net, {"loss": loss})
        if isinstance(settings, (ProtoNetSettings, LinearHeadSettings)):
            if regression:
                raise ConfigError(f"learner.name: {settings.name} is for class labels; the data gives values")
            learner = _baseline(settings, net, outputs_of(example), tasks)
        else:
            learner = LEARNERS[settings.name](net, loss=loss, **_options(settings))
    learner.look_at(example.support_x)
    return learner


def _policy(config: RunConfig, environment: Environment) -> MetaLearner:
    """The learner of a policy in ``environment``."""
    with seeded(config.training.seed):
        net = build_policy_net(config.net, environment)
        if isinstance(config.learner, CustomLearner):
            return _own(config.learner, net, {"environment": environment})
        return learners.PolicyMAML(net, environment, **config.learner.model_dump(exclude={"name"}))


def _own(settings: CustomLearner, net: nn.Module, optional: dict[str, Any]) -> MetaLearner:
    """The user's learner, called with those of ``optional`` that it takes."""
    learner = call(settings.name, "learner.name", settings.args, net, optional=optional)
    if not isinstance(learner, MetaLearner):
        raise ConfigError(f"learner.name: {settings.name} gave {type(learner).__name__}, expected a MetaLearner")
    return learner


def _example(config: RunConfig, tasks: dict[str, TaskSource]) -> Task:
    """A task as the learner meets it in evaluation, which says how many outputs the net has."""
    split = next(reversed(tasks)) if isinstance(config.learner, LinearHeadSettings) else next(iter(tasks))
    return tasks[split].task(0)


def _widest(config: RunConfig, example: Task) -> Task:
    """The example with the highest label that any of the run's tasks has: where ways vary, it may lack that itself."""
    if not isinstance(config.data, EpisodeSettings) or example.query_y.is_floating_point():
        return example
    labels = example.query_y.clone()
    labels[-1] = labels[-1].clamp(min=config.data.most_ways - 1)
    return example._replace(query_y=labels)


def _baseline(settings: Any, net: nn.Module, ways: int, tasks: dict[str, TaskSource]) -> MetaLearner:
    if isinstance(settings, ProtoNetSettings):
        return learners.ProtoNet(net, ways, head=settings.head)
    train = tasks.get("train")
    if not isinstance(train, Episodes):
        raise ConfigError("learner.name: linear_head needs data with classes; found " + type(train).__name__)
    return learners.LinearHead(net, ways, train.classes, **_options(settings))


def _options(settings: Any) -> dict[str, Any]:
    """A learner's arguments from its settings."""
    options = settings.model_dump(exclude={"name"})
    if "inner_gradient" in options:
        options["gradient"] = Mixed() if options.pop("inner_gradient") == "mixed" else Reverse()
        options["remat"] = named_remat(options["remat"])
    switches = {name: options.pop(name) for name in SWITCHES if name in options}
    if settings.name == "maml_pp":  # They are arguments of its own.
        return {**options, **switches}
    return {**options, "improvements": Improvements(**switches)} if switches else options
