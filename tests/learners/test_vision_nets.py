"""Vision transformers, ConvNeXt and Swin as torchvision builds them, and small nets of their kind without it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from metahpo.errors import NetError
from metahpo.learners import CAVIA, MAML, Phase, WarpMAML
from metahpo.tasks import Task
from metahpo.training.engines import Loop, Threads, Trace, VMap
from metahpo.tuning import tune_decay, tune_rates

TRAINING = Phase(training=True)


class Depth(nn.Module):
    """Stochastic depth by samples, as torchvision draws it: in place, into new memory."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or not self.p:
            return x
        kept = torch.empty([len(x), *[1] * (x.dim() - 1)], dtype=x.dtype)
        kept.bernoulli_(1 - self.p)  # Not taken from what it returns.
        return x * kept / (1 - self.p)


class Attention(nn.Module):
    """Reads the weights of its layers, as torchvision's does, and of torch's attention the last layer's."""

    def __init__(self, p: float = 0.0):
        super().__init__()
        self.patches, self.depth = nn.Linear(6, 4), Depth(p)
        self.qkv, self.attention = nn.Linear(4, 12), nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.patches(x.reshape(len(x), -1, 6))
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return self.head((x + self.depth(self.attention(q, k, v)[0])).mean(1))


def vit(p):
    models = pytest.importorskip("torchvision.models.vision_transformer")
    net = models.VisionTransformer(8, 4, 1, 2, 8, 16, dropout=p, num_classes=3)
    nn.init.normal_(net.heads.head.weight)  # Zero at first, where the body has no gradient.
    return net


def swin(p):
    models = pytest.importorskip("torchvision.models.swin_transformer")
    return models.SwinTransformer([2, 2], 8, [2], [2], [2, 2], stochastic_depth_prob=p, num_classes=3)


def convnext(p):
    models = pytest.importorskip("torchvision.models.convnext")
    config = models.CNBlockConfig
    return models.ConvNeXt([config(8, 16, 1), config(16, None, 1)], p, layer_scale=0.1, num_classes=3)


NETS = {"attention": Attention, "vit": vit, "swin": swin, "convnext": convnext}


def batch() -> Task:
    x = torch.randn(2, 2, 3, 3, 8, 8, dtype=torch.float64)
    y = torch.arange(3).repeat(2, 1)
    return Task(x[0], y, x[1], y)


@sdpa_kernel(SDPBackend.MATH)
def plain(net: nn.Module, tasks: Task) -> dict[str, torch.Tensor]:
    """The outer gradient of one inner step at rate 0.125."""
    params = dict(net.named_parameters())
    loss = torch.zeros((), dtype=torch.float64)
    for support_x, support_y, query_x, query_y in zip(*tasks):
        inner = F.cross_entropy(functional_call(net, params, support_x), support_y)
        grads = torch.autograd.grad(inner, list(params.values()), create_graph=True)
        fitted = {name: p - 0.125 * g for (name, p), g in zip(params.items(), grads)}
        loss = loss + F.cross_entropy(functional_call(net, fitted, query_x), query_y) / 2
    return dict(zip(params, torch.autograd.grad(loss, list(params.values()))))


def learnt(engine, learner, tasks):
    grads = engine().meta_gradient(learner, tasks, TRAINING).grads
    return {name.removeprefix("module.net."): g for name, g in grads.items()}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", NETS)
def test_gradients_are_those_of_a_plain_loop(name):
    net, tasks = NETS[name](0.0).double().train(), batch()
    wanted = plain(net, tasks)
    for engine in (Loop, Threads, VMap):
        found = learnt(engine, MAML(net, steps=1, inner_lr=0.125), tasks)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", NETS)
def test_with_stochastic_depth_loop_draws_as_a_plain_loop_and_threads_say_who_draws(name):
    net, tasks = NETS[name](0.4).double().train(), batch()
    learner = MAML(net, steps=1, inner_lr=0.125)
    torch.manual_seed(1)
    wanted = plain(net, tasks)
    torch.manual_seed(1)
    torch.testing.assert_close(learnt(Loop, learner, tasks), wanted, rtol=1e-9, atol=1e-10)
    learnt(VMap, learner, tasks)
    who = r"(module '.+' \(\w*Depth\)|the net \(VisionTransformer\))"
    with pytest.raises(NetError, match=f"cannot run {who}: it draws"):
        Threads().meta_gradient(learner, tasks, TRAINING)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_draws_stochastic_depth_for_each_task():
    class Scaled(nn.Linear):
        def forward(self, x):
            return depth(super().forward(x))

    net, depth = Scaled(2, 1, bias=False).double(), Depth(0.5)
    nn.init.ones_(net.weight)
    x = torch.ones(30, 40, 2, dtype=torch.float64)
    learner = MAML(net, steps=1, inner_lr=0.0, loss=lambda out, y: out.mean())
    for engine in (VMap(), Trace()):
        losses = engine.meta_gradient(learner, Task(x, x, x, x), TRAINING).losses
        assert losses.unique().numel() > 10
        assert float(losses.mean()) == pytest.approx(2.0, abs=0.4)  # 6 deviations of 1200 draws of 0 or 4.


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["attention", "vit", "swin"])
def test_warp_layers_stay_out_of_layers_that_are_not_called(name):
    net, tasks = NETS[name](0.0).double(), batch()
    learner = WarpMAML(net, steps=1, inner_lr=0.125)
    found = learnt(Loop, learner, tasks)
    wanted = plain(net, tasks)
    # They begin as the identity, where the net's own weights have MAML's gradient.
    for key, value in wanted.items():
        layer, _, kind = key.rpartition(".")
        ours = found[key] if key in found else found[f"{layer}.0.{kind}"]
        torch.testing.assert_close(ours, value, rtol=1e-9, atol=1e-10)
    for engine in (Threads, VMap):
        torch.testing.assert_close(learnt(engine, learner, tasks), found, rtol=1e-9, atol=1e-10)
    assert not any("out_proj.1" in key for key in found)


def test_cavia_modulates_channels_that_stand_last_and_refuses_a_layer_that_is_not_called():
    tasks = batch()
    learner = CAVIA(Attention(), context=2, steps=1).double()  # After "patches", [N, L, 4].
    assert all(g.isfinite().all() for g in learnt(Loop, learner, tasks).values())
    context = learner.adapt(*tasks.select(0)[:2], Phase()).params["patches.1.context"]
    assert bool(context.any())
    with pytest.raises(NetError, match=r"CAVIA: after: the net never calls its layer 'qkv', .*name another"):
        learnt(Loop, CAVIA(Attention(), after="qkv").double(), tasks)


@pytest.mark.parametrize("name", ["vit", "swin", "convnext"])
def test_new_weights_are_refused_with_the_way_out(name):
    x, y = torch.randn(6, 3, 8, 8), torch.arange(6) % 3
    with pytest.raises(NetError, match="pass a function that builds the net in its place, or fresh=False"):
        tune_rates(NETS[name](0.3), F.cross_entropy, [(x, y)], [(x, y)], steps=2, phases=1, iterations=1)


def test_tunings_train_them_with_stochastic_depth():
    x, y = torch.randn(6, 3, 8, 8), torch.arange(6) % 3
    data, options = [(x, y)], {"steps": 1, "phases": 1, "iterations": 1}
    for net, fresh in ((lambda: convnext(0.3), True), (convnext(0.3), False)):
        tune_rates(net, F.cross_entropy, data, data, fresh=fresh, **options)
    decay = tune_decay(convnext(0.3), F.cross_entropy, (x, y), (x, y), steps=1, every=1, batch=6)
    assert len(decay.history) == 1
