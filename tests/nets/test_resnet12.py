"""ResNet12 against the same net written with functions, and under both engines."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from metahpo.building_net import build_net
from metahpo.config import RunConfig
from metahpo.errors import NetError
from metahpo.learners import MAML, Phase
from metahpo.nets import ResNet12
from metahpo.tasks import Task
from metahpo.training.engines import Loop, VMap

WAYS = 3


def test_has_the_parameters_of_the_paper():
    net = ResNet12((3, 84, 84), 5)
    widths, expected, channels = (64, 128, 256, 512), 512 * 5 + 5, 3
    for width in widths:
        expected += 9 * channels * width + 2 * 9 * width**2 + channels * width + 4 * 2 * width
        channels = width
    assert sum(p.numel() for p in net.parameters()) == expected


def test_equals_the_net_written_with_functions():
    net = ResNet12((2, 21, 21), WAYS, widths=(4, 5, 6, 7), slope=0.2).double()
    p = dict(net.named_parameters())
    with torch.no_grad():
        for value in p.values():
            value.add_(torch.randn_like(value), alpha=0.1)
    x = torch.randn(6, 2, 21, 21, dtype=torch.float64)
    out = x
    for i in range(4):
        inner, block = out, f"blocks.{i}"
        for j in (0, 3, 6):
            inner = F.conv2d(inner, p[f"{block}.layers.{j}.weight"], padding=1)
            inner = _normalise(inner, p[f"{block}.layers.{j + 1}.weight"], p[f"{block}.layers.{j + 1}.bias"])
            inner = F.leaky_relu(inner, 0.2) if j < 6 else inner
        around = F.conv2d(out, p[f"{block}.shortcut.0.weight"])
        around = _normalise(around, p[f"{block}.shortcut.1.weight"], p[f"{block}.shortcut.1.bias"])
        out = F.max_pool2d(F.leaky_relu(inner + around, 0.2), 2)
    expected = F.linear(out.flatten(1), p["linear.weight"], p["linear.bias"])
    torch.testing.assert_close(net(x), expected)


def _normalise(x, scale, shift):
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * scale[:, None, None] + shift[:, None, None]


@pytest.mark.parametrize("size", [1, 5, 28, 84])
def test_takes_images_of_any_size(size):
    net = ResNet12((1, size, size), WAYS, widths=(2, 2, 2, 2))
    assert net(torch.randn(2, 1, size, size)).shape == (2, WAYS)


def test_engines_agree():
    learner = MAML(ResNet12((1, 10, 10), WAYS, widths=(2, 3, 4, 5)), steps=2).double()
    y = torch.arange(WAYS).repeat(2, 2)
    x = torch.randn(2, 2 * WAYS, 1, 10, 10, dtype=torch.float64)
    tasks = Task(x, y, torch.randn_like(x), y)
    loop, vmap = (engine.meta_gradient(learner, tasks, Phase(training=True)) for engine in (Loop(), VMap()))
    torch.testing.assert_close(loop.grads, vmap.grads, rtol=1e-9, atol=1e-10)


def test_is_built_from_a_config():
    net = {"name": "resnet12", "widths": [2, 3, 4, 5], "slope": 0.3}
    config = RunConfig(data={"source": "glyphs"}, net=net, learner={"name": "maml"})
    x, y = torch.zeros(WAYS, 1, 10, 10), torch.arange(WAYS)
    built = build_net(config.net, Task(x, y, x, y))
    assert isinstance(built, ResNet12)
    assert [block.activation.negative_slope for block in built.blocks] == [0.3] * 4
    assert built.linear.weight.shape == (WAYS, 5)
    with pytest.raises(NetError, match=r"net resnet12 takes images \[C, H, W\]; the data gives \[10\]"):
        build_net(config.net, Task(x[:, 0, 0], y, x[:, 0, 0], y))
