"""Warp-MAML and CAVIA, which add layers to a net, on nets that read or share their layers, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from metahpo.errors import NetArgumentError
from metahpo.learners import CAVIA, LinearHead, Phase, ProtoNet, WarpMAML
from metahpo.learners.base import MetaLearner
from metahpo.tasks import Task
from metahpo.testing.learner_subject import reverse
from metahpo.training.checkpoint import load_learner
from metahpo.training.engines import Loop, Threads, VMap

WAYS, LENGTH, WIDTH = 3, 5, 4
TRAINING = Phase(training=True)


class Encoder(nn.Module):
    """Its layers' weights are read by attribute, and some are never called."""

    def __init__(self):
        super().__init__()
        self.body, self.attention = nn.Linear(WIDTH, WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 6, 0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, WAYS)

    def forward(self, x):
        x = self.body(x)
        return self.head(self.layer(self.attention(x, x, x)[0] * self.body.weight.mean()).mean(1))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WAYS)
        self.again = self.body

    def forward(self, x):
        return self.head(torch.tanh(self.again(torch.tanh(self.body(x)))).mean(1))


class Convolutions(nn.Module):
    def __init__(self, dims: int):
        super().__init__()
        self.dims, convolution = dims, getattr(nn, f"Conv{dims}d")
        self.body, self.head = convolution(1, 2, 3), nn.Linear(2, WAYS)

    def forward(self, x):
        return self.head(torch.tanh(self.body(self.cube(x))).flatten(2).mean(2))

    def cube(self, x):
        """[N, LENGTH, WIDTH] as [N, 1, ...] with as many dimensions more as the convolution has."""
        return x.flatten(1)[:, None] if self.dims == 1 else x[:, None, :, :, None].expand(*[-1] * 4, 3)


@pytest.fixture(autouse=True)
def differentiable():
    """Attention by a kernel that plain PyTorch can derive twice."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture
def tasks() -> Task:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, 2 * WAYS, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    y = torch.arange(WAYS).repeat(2, 2)
    return Task(x[0], y, x[1], y)


def warped(net: nn.Module) -> WarpMAML:
    """With warps that are no identity."""
    learner = WarpMAML(net, steps=2, inner_lr=0.25)
    with torch.no_grad():
        for name, p in learner.outer_params().items():
            if name not in {f"module.net.{n}" for n, _ in net.named_parameters()}:
                p.add_(0.3 * torch.randn_like(p))
    return learner


def check(learner: MetaLearner, function, params: dict, task: Task) -> None:
    """Compares the loss after two plain steps of ``function(params, x)``, and its gradient, with the learner's."""
    outer = learner.outer_params()
    fast = {name: p if p.requires_grad else p.clone().requires_grad_() for name, p in params.items()}
    for _ in range(2):
        loss = F.cross_entropy(function(fast, task.support_x), task.support_y)
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True, materialize_grads=True)
        fast = {name: p - 0.25 * g for (name, p), g in zip(fast.items(), grads)}
    expected = F.cross_entropy(function(fast, task.query_x), task.query_y)
    wanted = torch.autograd.grad(expected, list(outer.values()), materialize_grads=True)
    batch = Task(*(t[None] for t in task))
    for engine in (Loop(), Threads(), VMap()):
        found = engine.meta_gradient(learner, batch, TRAINING)
        torch.testing.assert_close(found.loss, expected.detach(), rtol=1e-9, atol=1e-9)
        for name, g in zip(outer, wanted):
            torch.testing.assert_close(found.grads[name], g, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("kind", "names"), [(Encoder, ("body", "layer.linear1", "layer.linear2")), (Shared, ("body",))]
)
def test_a_warp_after_a_linear_layer_is_a_product(kind, names, tasks):
    torch.manual_seed(0)
    net = kind().double()
    learner = warped(net)
    ours = learner.module.net

    def function(params, x):
        products = dict(params)
        for name in names:
            warp = ours.get_parameter(f"{name}.1.weight")
            for key in (f"{name}.weight", f"{name}.bias"):
                products[key] = warp @ params[key]
        return encoder(products, params["body.weight"], x) if kind is Encoder else functional_call(net, products, x)

    # What the net reads of a layer is not warped.
    def encoder(params, read, x):
        x = F.linear(x, params["body.weight"], params["body.bias"])
        part = {n.partition(".")[2]: p for n, p in params.items() if n.startswith("attention.")}
        x = functional_call(net.attention, part, (x, x, x))[0] * read.mean()
        part = {n.partition(".")[2]: p for n, p in params.items() if n.startswith("layer.")}
        return F.linear(functional_call(net.layer, part, x).mean(1), params["head.weight"], params["head.bias"])

    check(learner, function, dict(learner.initial(TRAINING).params), tasks.select(0))


@pytest.mark.parametrize("dims", [1, 3])
def test_a_warp_after_a_convolution(dims, tasks):
    torch.manual_seed(0)
    net = Convolutions(dims).double()
    learner, convolve = warped(net), {1: F.conv1d, 3: F.conv3d}[dims]
    warp = learner.module.net.get_parameter("body.1.weight")
    assert warp.shape == (2, 2, *[3] * dims)

    def function(params, x):
        x = convolve(convolve(net.cube(x), params["body.weight"], params["body.bias"]), warp, padding=1)
        return F.linear(torch.tanh(x).flatten(2).mean(2), params["head.weight"], params["head.bias"])

    check(learner, function, dict(learner.initial(TRAINING).params), tasks.select(0))
    # The version before had none here.
    fresh = WarpMAML(net)
    fresh.load_state_dict({n: p for n, p in WarpMAML(net).state_dict().items() if "body.1." not in n})
    torch.testing.assert_close(fresh.module.net(tasks.support_x[0]), net(tasks.support_x[0]))


def test_cavia_scales_the_features_of_sequences(tasks):
    """Of [N, T, C] after a linear layer the last dimension, of [N, C, T] after a convolution the second."""
    torch.manual_seed(0)
    net = Encoder().double()
    learner = CAVIA(net, context=2, after="layer.linear1", steps=2, inner_lr=0.25)
    film = learner.module.net.get_submodule("layer.linear1.1").linear

    def function(params, x):
        scale, shift = film(params["context"]).chunk(2)
        own = dict(learner.module.net.named_parameters())
        changed = {n: own[n] for n, _ in net.named_parameters()}
        changed["layer.linear1.weight"] = (1 + scale)[:, None] * own["layer.linear1.weight"]
        changed["layer.linear1.bias"] = (1 + scale) * own["layer.linear1.bias"] + shift
        return functional_call(net, changed, x)

    check(learner, function, {"context": learner.initial(TRAINING).params["layer.linear1.1.context"]}, tasks.select(0))
    net = Convolutions(1).double()
    learner = CAVIA(net, context=2, after="body", steps=2, inner_lr=0.25)
    film = learner.module.net.get_submodule("body.1").linear

    def convolutional(params, x):
        scale, shift = film(params["context"]).chunk(2)
        own = dict(learner.module.net.named_parameters())
        x = F.conv1d(net.cube(x), own["body.weight"], own["body.bias"]) * (1 + scale)[:, None] + shift[:, None]
        return F.linear(torch.tanh(x).flatten(2).mean(2), own["head.weight"], own["head.bias"])

    check(learner, convolutional, {"context": learner.initial(TRAINING).params["body.1.context"]}, tasks.select(0))


def test_a_context_that_the_net_never_reaches_is_refused(tasks):
    learner = CAVIA(Encoder().double(), after="layer.self_attn.out_proj")
    with pytest.raises(NetArgumentError, match=r"CAVIA: after: the net never calls its layer 'layer\.self_attn\.out_"):
        learner.meta_loss(tasks.select(0), TRAINING)
    backwards = Encoder().double()
    reverse(backwards)
    with pytest.raises(NetArgumentError, match=r"registers 'head' where it calls 'body'; .* such as after='body'"):
        CAVIA(backwards).meta_loss(tasks.select(0), TRAINING)
    CAVIA(backwards, after="body").meta_loss(tasks.select(0), TRAINING)
    with pytest.raises(NetArgumentError, match="CAVIA: adapt_norms: the context alone is adapted"):
        CAVIA(Encoder(), adapt_norms=True)


def test_a_block_of_layers_is_followed(tasks):
    """One that is an nn.Sequential runs its last child by itself, and reads its channels from an attribute."""

    class Block(nn.Sequential):
        out_features = WIDTH

    torch.manual_seed(0)
    net = nn.Sequential(Block(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, WIDTH)), nn.Flatten(), nn.Linear(20, WAYS))
    learner = CAVIA(net.double(), context=2, after="0", steps=1)
    learner.meta_loss(tasks.select(0), TRAINING)
    film, x = learner.module.net.get_submodule("0.3"), tasks.support_x[0]
    with torch.no_grad():
        film.context.fill_(0.5)
    scale, shift = film.linear(film.context).chunk(2)
    expected = net[2]((net[0](x) * (1 + scale) + shift).flatten(1))
    torch.testing.assert_close(learner.module.net(x), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda net: WarpMAML(net),
        lambda net: CAVIA(net, context=2, after="layer.linear1"),
        lambda net: ProtoNet(net, WAYS),
        lambda net: LinearHead(net, WAYS, WAYS),
    ],
)
def test_state_dicts_of_the_version_before_are_taken(make):
    """There followed layers stood with their followers in a sequence, and a head that was left out was not saved."""
    trained, fresh = make(Encoder()), make(Encoder())
    kept = trained.state_dict()
    followed = [name for name, m in trained.named_modules() if hasattr(m, "follower")]
    older = {}
    for name, value in kept.items():
        owner, _, key = name.rpartition(".")
        older[f"{owner}.0.{key}" if owner in followed else name] = value
    if not followed:
        older = {name: value for name, value in older.items() if not name.startswith("module.net.head")}
    assert older.keys() != kept.keys()
    for load in (lambda: fresh.load_state_dict(older), lambda: load_learner(fresh, older, "a file")):
        load()
        for name, value in fresh.state_dict().items():
            assert torch.equal(value, kept[name]) or (not followed and name.startswith("module.net.head"))
