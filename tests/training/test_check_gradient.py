"""A gradient that is not the slope of its loss is said, and no other."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from metahpo.learners import MAML, Phase
from metahpo.nets import Conv4
from metahpo.tasks import Task
from metahpo.training.engines import check_gradient


class Wrong(torch.autograd.Function):
    """Twice the input times 1, with the right first derivative and a wrong second one."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, cotangent):
        return 2 * ctx.saved_tensors[0].detach() * cotangent


class Squares(nn.Module):
    def forward(self, x):
        return Wrong.apply(x)


def images() -> Task:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 6, 1, 8, 8, generator=generator), torch.arange(3).repeat(2, 2)
    return Task(x, y, x.flip(1), y)


def messages(net: nn.Module, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_gradient(MAML(net, steps=3, inner_lr=0.5, **options), images(), Phase(training=True))
    return [str(w.message) for w in caught if "outer gradient" in str(w.message)]


def net(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), layer, nn.Linear(8, 3))


def test_a_wrong_second_derivative_is_said():
    assert "wrong second derivative" in messages(net(Squares()))[0]
    assert messages(net(Squares()), first_order=True) == []


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.Dropout(0.5), nn.Tanh(), nn.Hardsigmoid()])
def test_nothing_is_said_of_right_ones(layer):
    assert messages(net(layer)) == []


def test_nothing_is_said_of_maxima_and_batch_norms():
    torch.manual_seed(0)
    assert messages(Conv4((1, 8, 8), 3, filters=4)) == []
