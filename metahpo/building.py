"""From a config to the objects of a run."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from metahpo import torchrun
from metahpo.building_data import SPLITS, build_tasks, load_images
from metahpo.building_rl import environment_of
from metahpo.config import CustomNet, RunConfig
from metahpo.config_data import OmniglotSettings
from metahpo.config_learners import CustomLearner, MAMLSettings, PolicyMAMLSettings
from metahpo.custom import brief, call, check_learner, reason
from metahpo.errors import CheckpointError, ConfigError, NetError, did_you_mean
from metahpo.inner import Mixed, Reverse, named_remat
from metahpo.learners import MAML, MAMLPlusPlus, MetaLearner, PolicyMAML
from metahpo.nets import MLP, Conv4, ResidualMLP, ResNet12, SmallResNet
from metahpo.rl import Environment
from metahpo.tasks import LabelledImages, Task, TaskSource
from metahpo.training.checkpoint import CheckpointStore
from metahpo.training.distributed import current
from metahpo.training.environment import seeded
from metahpo.training.settings import TrainingSettings
from metahpo.training.trainer import Trainer

NETS: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "residual_mlp": ResidualMLP,
    "conv4": Conv4,
    "resnet12": ResNet12,
    "small_resnet": SmallResNet,
}


def build_learner(config: RunConfig, example: Task) -> MetaLearner:
    """The learner for tasks like ``example`` (one task), its net initialised from the config's seed.

    Raises NetError if the net cannot take the inputs or its output does not fit the targets.
    """
    regression = example.query_y.is_floating_point()
    loss = F.mse_loss if regression else F.cross_entropy
    settings, environment = config.learner, environment_of(config)
    with seeded(config.training.seed):
        net = build_policy_net(config, environment) if environment else build_net(config, example)
        if environment is None:
            check_net(net, example, config.net.name)
        if isinstance(settings, CustomLearner):
            learner = call(
                settings.name, "learner.name", settings.args, net, optional={"loss": loss, "environment": environment}
            )
            if not isinstance(learner, MetaLearner):
                raise ConfigError(
                    f"learner.name: {settings.name} gave {type(learner).__name__}, expected a MetaLearner"
                )
            return learner
        if isinstance(settings, PolicyMAMLSettings):
            assert environment is not None  # environment_of refuses other data.
            return PolicyMAML(net, environment, **settings.model_dump(exclude={"name"}))
        kind = MAML if isinstance(settings, MAMLSettings) else MAMLPlusPlus
        options = settings.model_dump(exclude={"name", "inner_gradient", "remat"})
        gradient = Mixed() if settings.inner_gradient == "mixed" else Reverse()
        return kind(net, loss=loss, gradient=gradient, remat=named_remat(settings.remat), **options)


def build_net(config: RunConfig, example: Task) -> nn.Module:
    """The net for inputs and targets like ``example``'s."""
    return make_net(config.net, tuple(example.support_x.shape[1:]), _outputs(example))


def build_policy_net(config: RunConfig, environment: Environment) -> nn.Module:
    """The net for a policy's means in ``environment``; raises NetError if it does not map observations to actions."""
    net = make_net(config.net, (environment.observation_size,), environment.action_size)
    check_outputs(
        net, torch.zeros(2, environment.observation_size), environment.action_size, config.net.name, "actions"
    )
    return net


def make_net(settings: Any, in_shape: tuple[int, ...], out_features: int) -> nn.Module:
    """The net that the settings of the section ``net`` describe, or the user's own."""
    shape = {"in_shape": in_shape, "out_features": out_features}
    if isinstance(settings, CustomNet):
        net = call(settings.name, "net.name", settings.args, optional=shape)
        if not isinstance(net, nn.Module):
            raise ConfigError(f"net.name: {settings.name} gave {type(net).__name__}, expected a torch.nn.Module")
        return net
    kind = NETS[settings.name]
    if kind not in (MLP, ResidualMLP) and len(in_shape) != 3:
        raise NetError(f"net {settings.name} takes images [C, H, W]; the data gives {list(in_shape)}; choose mlp")
    try:
        return kind(**shape, **settings.model_dump(exclude={"name"}))
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        raise NetError(f"net {settings.name} of this size cannot be made: {brief(error)}") from error


def check_net(net: nn.Module, example: Task, name: str) -> None:
    """Raises NetError unless ``net`` maps the task's inputs, support and query, to outputs that fit its targets."""
    for x in (example.support_x.cpu(), example.query_x.cpu()):
        check_outputs(net, x, _outputs(example), name, "values" if example.query_y.is_floating_point() else "ways")


def check_outputs(net: nn.Module, x: torch.Tensor, outputs: int, name: str, what: str) -> None:
    """Raises NetError unless ``net`` maps inputs [N, ...] to [N, outputs]; what: what these are, for the message."""
    expected = [len(x), outputs]
    was_training = net.training
    try:
        with torch.no_grad():
            # In evaluation mode, so that the trial leaves running statistics alone.
            output = net.eval()(x)
    except Exception as error:
        raise NetError(f"net {name} fails on inputs {list(x.shape)}: {brief(error)}") from error
    finally:
        net.train(was_training)
    found = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if found != expected:
        raise NetError(f"net {name} gives {found} for inputs {list(x.shape)}; expected {expected} ({outputs} {what})")


def build(
    config: RunConfig, splits: tuple[str, ...] = SPLITS, images: LabelledImages | None = None
) -> tuple[dict[str, TaskSource], MetaLearner]:
    """The tasks of each split and the learner of a run, all tried: what cannot work is refused before any work.

    All ranks of a run call it together; what cannot work on one stops all.
    """
    ranks = current()
    if ranks.size > 1 and isinstance(config.data, OmniglotSettings) and config.data.download:
        with ranks.agreed():
            if not torchrun.local_rank():  # One process a machine, lest several write the same file.
                load_images(config.data)
    with ranks.agreed():
        tasks = build_tasks(config, splits, images)
        example = tasks["train"].task(0)
        learner = build_learner(config, example)
        check_optimizer(config.training, learner)
        check_learner(learner, config.learner.name, tasks["train"], config.training)
    return tasks, learner


def resume_trainer(
    config: RunConfig, run_dir: str | Path, splits: tuple[str, ...] = SPLITS, images: LabelledImages | None = None
) -> Trainer:
    """The trainer of the run in ``run_dir`` as its newest checkpoint left it."""
    tasks, learner = build(config, splits, images)
    store = CheckpointStore(Path(run_dir) / "checkpoints")
    ranks = current()
    if not ranks.on_first(store.list):
        # Killed before its first epoch was saved, the run has nothing to go on from and begins anew.
        return Trainer(learner, tasks["train"], tasks["val"], config.training, run_dir)
    with ranks.agreed():
        path, state, _ = ranks.on_first(store.latest)
        _check_settings(config.training, state["settings"], path)
        try:
            return Trainer.resume(run_dir, learner, tasks["train"], tasks["val"], config.training)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: cannot go on from it: {brief(error)}") from error


def _outputs(example: Task) -> int:
    y = example.support_y
    return y.shape[-1] if y.is_floating_point() else int(max(y.max(), example.query_y.max())) + 1


def check_optimizer(settings: TrainingSettings, learner: MetaLearner) -> None:
    """Raises ConfigError unless the settings' optimizer can be made and makes a step, tried on zeros."""
    name, args = settings.optimizer, settings.optimizer_args
    params = [torch.zeros_like(p, device=settings.torch_device()) for p in learner.outer_params().values()]
    if not params:
        raise ConfigError(f"learner.name: {type(learner).__name__} has no parameter to learn (that requires grad)")
    if taken := sorted({"lr", "params"} & set(args)):
        raise ConfigError(f"training.optimizer_args.{taken[0]}: should not be here; the rate is training.lr")
    kind = getattr(torch.optim, name)
    known = [k for k in inspect.signature(kind).parameters if k not in ("params", "lr")]
    for key in args:
        if key not in known:
            raise ConfigError(f"training.optimizer_args: {name} has no argument {key!r}; {did_you_mean(key, known)}")
    try:
        optimizer = kind([p.requires_grad_() for p in params], lr=settings.lr, **args)
    except Exception as error:
        where = f"optimizer_args: {name} refuses {args}" if args else f"optimizer: {name} cannot be used"
        raise ConfigError(f"training.{where}: {reason(error)}") from error
    for param in params:
        param.grad = torch.zeros_like(param)
    try:
        optimizer.step()
    except Exception as error:
        raise ConfigError(f"training.optimizer: {name} cannot train this learner: {reason(error)}") from error


def _check_settings(settings: TrainingSettings, trained: dict[str, Any], path: Path) -> None:
    """Raises ConfigError if config.yaml asks for other settings than the run was trained with.

    Device, engine and threads may change, which give the same numbers to rounding, how often a GPU's losses are read,
    and the number of test tasks.
    """
    asked = settings.model_dump(exclude={"device", "engine", "threads", "check", "read_every", "test_tasks"})
    lines = [
        f"training.{key}: config.yaml says {asked[key]!r}, but {path.name} was trained with {trained[key]!r}; "
        "set it back, or train anew"
        for key in asked
        if key in trained and trained[key] != asked[key]
    ]
    if lines:
        raise ConfigError("\n".join(lines))
