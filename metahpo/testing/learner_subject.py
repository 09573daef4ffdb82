"""A learner that is checked, and the tasks it is checked on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from metahpo.learners.base import MetaLearner
from metahpo.tasks.task import Task
from metahpo.training.environment import seeded

SHAPE, WAYS, SHOTS, QUERIES = (1, 8, 8), 3, 2, 2


@dataclass(frozen=True)
class Patterns:
    """Numbered tasks of small images: each class of a task is a random pattern, its examples are that with noise.

    float64; support_x [6, 1, 8, 8], support_y [6] in 0..2, and the same for the query set.
    """

    seed: int = 0

    def task(self, index: int) -> Task:
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        classes = torch.rand(WAYS, 1, *SHAPE, generator=generator, dtype=torch.float64)
        noise = torch.rand(WAYS, SHOTS + QUERIES, *SHAPE, generator=generator, dtype=torch.float64)
        support, query = (0.7 * classes + 0.3 * noise).split([SHOTS, QUERIES], 1)
        labels = torch.arange(WAYS)
        return Task(
            support.flatten(0, 1),
            labels.repeat_interleave(SHOTS),
            query.flatten(0, 1),
            labels.repeat_interleave(QUERIES),
        )

    def batch(self, indices: Sequence[int]) -> Task:
        return Task(*map(torch.stack, zip(*(self.task(index) for index in indices))))


def smooth_net() -> nn.Module:
    """Batch norm and convolutions without a kink, so that finite differences converge."""
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.AvgPool2d(2)]
    more = [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, *more, nn.Linear(16, WAYS))


def kinked_net() -> nn.Module:
    """What few-shot nets are made of, which the engines have kernels for."""
    block = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    again = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(block, again, nn.Flatten(), nn.Linear(16, WAYS))


class Parts(nn.Module):
    """A sequence as a body and a head."""

    def __init__(self, layers: nn.Sequential):
        super().__init__()
        self.body, self.head = layers[:-1], layers[-1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def reverse(net: nn.Module) -> None:
    """Registers the children of every module in the opposite order, but of containers, which are run in it."""
    for module in net.modules():
        if not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            for name in reversed(list(module._modules)):
                module._modules[name] = module._modules.pop(name)


@dataclass(frozen=True)
class LearnerSubject:
    """A way to make the learner, and what it is to be held to: see ``check_learner``."""

    make: Callable[..., MetaLearner]
    options: dict[str, Any] = field(default_factory=dict)
    net: Callable[[], nn.Module] | None = None
    tasks: Any = None
    engines: Sequence[str] = ("loop", "threads", "vmap", "trace")
    exact: bool = True

    def fresh(self, *, smooth: bool = False, parts: bool = False, backwards: bool = False) -> MetaLearner:
        """A new one, in float64, always with the same initial values.

        parts: of a net that calls its layers by name; backwards: one that registers them in the opposite order.
        """
        with seeded(0):
            net = self.net() if self.net else smooth_net() if smooth else kinked_net()
            if parts and isinstance(net, nn.Sequential):
                net = Parts(net)
            if backwards:
                reverse(net)
            learner = self.make(net, **self.options)
            assert isinstance(learner, MetaLearner), f"expected a MetaLearner, {self.make!r} gave {learner!r}"
            return learner.double()

    @cached_property
    def source(self) -> Any:
        return self.tasks or Patterns()

    @cached_property
    def batch(self) -> Task:
        return self.source.batch(range(3))


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """How far apart two tensors are, relative to the second's largest value (or 1e-3, if that is less)."""
    if first.shape != second.shape:
        return math.inf
    if not second.numel():
        return 0.0
    gap = float((first.detach().double() - second.detach().double()).abs().max())
    return gap / max(float(second.detach().double().abs().max()), 1e-3) if math.isfinite(gap) else math.inf
