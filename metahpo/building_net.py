"""From the section ``net`` of a config to a net that fits its tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from metahpo.config import CustomNet
from metahpo.custom import brief, call
from metahpo.errors import ConfigError, NetError
from metahpo.nets import MLP, Conv4, ResidualMLP, ResNet12, SmallResNet
from metahpo.rl import Environment
from metahpo.tasks import Task

NETS: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "residual_mlp": ResidualMLP,
    "conv4": Conv4,
    "resnet12": ResNet12,
    "small_resnet": SmallResNet,
}


def build_net(settings: Any, example: Task) -> nn.Module:
    """The net for inputs and targets like ``example``'s."""
    return make_net(settings, tuple(example.support_x.shape[1:]), outputs_of(example))


def build_policy_net(settings: Any, environment: Environment) -> nn.Module:
    """The net for a policy's means in ``environment``; raises NetError if it does not map observations to actions."""
    inputs, actions = environment.observation_size, environment.action_size
    net = make_net(settings, (inputs,), actions)
    check_outputs(net, torch.zeros(2, inputs), actions, settings.name, "actions")
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
        check_outputs(net, x, outputs_of(example), name, "values" if example.query_y.is_floating_point() else "ways")


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


def outputs_of(example: Task) -> int:
    """How many outputs a net for tasks like ``example`` has: the ways, or the values."""
    y = example.support_y
    return y.shape[-1] if y.is_floating_point() else int(max(y.max(), example.query_y.max())) + 1
