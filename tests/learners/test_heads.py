"""The learners that treat the head of a net apart, on nets whose head is hard to find, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

from metahpo.errors import NetArgumentError
from metahpo.learners import ANIL, BOIL, MAML, Improvements, LinearHead, Phase, ProtoNet, WarpMAML
from metahpo.tasks import Task
from metahpo.training.engines import Loop, Threads, VMap

WAYS, LENGTH, WIDTH = 3, 4, 5
TRAINING = Phase(training=True)


class Net(nn.Module):
    """Layers by name, registered in the order given, and a function that calls them."""

    def __init__(self, forward, **layers: nn.Module | nn.Parameter):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, x):
        return self.run(self, x.mean(1))


def tied() -> nn.Module:
    def run(net, x):
        return net.head(net.norm(net.body(x)))

    net = Net(run, body=nn.Linear(WIDTH, WIDTH), norm=nn.LayerNorm(WIDTH), head=nn.Linear(WIDTH, WIDTH))
    net.head.weight = net.body.weight
    return net


def plain(net, x):
    return net.head(torch.tanh(net.body(x)))


def body_and_head(run=plain, head: nn.Module | None = None, **more: nn.Module) -> nn.Module:
    return Net(run, body=nn.Linear(WIDTH, 6), head=head or nn.Linear(6, WAYS), **more)


class Attention(nn.Module):
    """Pools a sequence by a learnt query."""

    def __init__(self):
        super().__init__()
        self.head, self.query = nn.Linear(WIDTH + 1, WAYS), nn.Parameter(torch.randn(1, 1, WIDTH + 1))
        self.body, self.pool = nn.Linear(WIDTH, WIDTH + 1), nn.MultiheadAttention(WIDTH + 1, 2, batch_first=True)

    def forward(self, x):
        x = self.body(x)
        return self.head(self.pool(self.query.expand(len(x), 1, -1), x, x)[0][:, 0])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(6, WAYS), nn.GRU(WIDTH, 6, batch_first=True)

    def forward(self, x):
        return self.head(self.body(x)[0][:, -1])


class Classifier(nn.Module):
    """As timm builds them: the classifier in a module of its own, registered before a norm that runs before it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(WIDTH, 6)
        self.head = nn.Module()
        self.head.drop, self.head.fc, self.head.flatten = nn.Dropout(0.0), nn.Linear(6, WAYS), nn.Identity()
        self.fc_norm = nn.LayerNorm(6)

    def forward(self, x):
        x = self.fc_norm(self.stem(x).mean(1))
        return self.head.flatten(self.head.fc(self.head.drop(x)))


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WAYS, 1))

    def forward(self, weight):
        return self.gain * weight / weight.norm(dim=1, keepdim=True)


def parametrized(layer: nn.Linear) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Gain())


NETS = {
    "plain": (lambda: body_and_head(), "head"),
    "tied": (tied, "head"),
    # Not torch's weight norm, whose own second derivative plain PyTorch has wrong.
    "parametrized": (lambda: body_and_head(head=parametrized(nn.Linear(6, WAYS))), "head"),
    "spectral": (lambda: body_and_head(head=parametrizations.orthogonal(nn.Linear(6, WAYS))), "head"),
    "first": (lambda: Net(plain, head=nn.Linear(6, WAYS), body=nn.Linear(WIDTH, 6)), "head"),
    "last unused": (lambda: body_and_head(spare=nn.Linear(6, 2)), "head"),
    "softmax after": (lambda: body_and_head(lambda net, x: 5 * plain(net, x).softmax(-1)), "head"),
    "activation after": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(20, 6), nn.Linear(6, WAYS), nn.ReLU()), "2"),
    "layer norm registered after": (
        lambda: body_and_head(lambda net, x: net.head(net.norm(net.body(x))), norm=nn.LayerNorm(6)),
        "head",
    ),
    "layer norm after": (
        lambda: Net(lambda net, x: net.norm(plain(net, x)), norm=nn.LayerNorm(WAYS), **layers()),
        "norm",
    ),
    "two heads": (
        lambda: body_and_head(lambda net, x: (net.other(net.body(x)), plain(net, x))[1], other=nn.Linear(6, 2)),
        "head",
    ),
    "classifier": (Classifier, "head.fc"),
    "attention pooling": (Attention, "head"),
    "gru": (Recurrent, "head"),
    "called twice": (
        lambda: Net(lambda net, x: net.head(torch.tanh(net.head(x))), body=nn.Linear(1, 1), head=nn.Linear(5, 5)),
        "head",
    ),
    "scaled": (
        lambda: body_and_head(lambda net, x: net.scale * plain(net, x), scale=nn.Parameter(torch.ones(1))),
        "head",
    ),
}


def layers():
    return {"head": nn.Linear(6, WAYS), "body": nn.Linear(WIDTH, 6)}


@pytest.fixture
def tasks() -> Task:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, 2 * WAYS, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    y = torch.arange(WAYS).repeat(2, 2)
    return Task(x[0], y, x[1], y)


def built(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = NETS[name][0]().double()
    return net, net.get_submodule(NETS[name][1])


def adapted(net: nn.Module, chosen: set[int], task: Task, steps: int = 2, rate: float = 0.25) -> torch.Tensor:
    """The query loss after plain gradient steps on the tensors ``chosen``, with the graph."""
    params = dict(net.named_parameters())
    names = [name for name, p in params.items() if id(p) in chosen]
    for _ in range(steps):
        loss = F.cross_entropy(functional_call(net, params, task.support_x), task.support_y)
        grads = torch.autograd.grad(loss, [params[n] for n in names], create_graph=True, materialize_grads=True)
        params |= {n: params[n] - rate * g for n, g in zip(names, grads)}
    return F.cross_entropy(functional_call(net, params, task.query_x), task.query_y)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("kind", [ANIL, BOIL])
def test_the_head_is_the_layer_that_runs_last(kind, name, tasks):
    net, head = built(name)
    within = {id(p) for p in head.parameters()}
    chosen = within if kind is ANIL else {id(p) for p in net.parameters()} - within
    learner, task = kind(net, steps=2, inner_lr=0.25), tasks.select(0)
    loss = learner.meta_loss(task, TRAINING)[0]
    expected = adapted(net, chosen, task)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    params = dict(net.named_parameters())
    grads = torch.autograd.grad(expected, list(params.values()), materialize_grads=True)
    found = Loop().meta_gradient(learner, Task(*(t[:1] for t in tasks)), TRAINING).grads
    for n, g in zip(params, grads):
        torch.testing.assert_close(found[f"module.net.{n}"], g, rtol=1e-8, atol=1e-9)


def given(net: nn.Module, head: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the head is given at its last call."""
    inputs = []
    handle = head.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    net(x)
    handle.remove()
    return inputs[-1].flatten(1)


@pytest.mark.parametrize("name", NETS)
def test_prototypes_are_of_what_the_head_is_given(name, tasks):
    net, head = built(name)
    learner, task = ProtoNet(net, WAYS), tasks.select(1)
    queries, support = given(net, head, task.query_x), given(net, head, task.support_x)
    means = torch.stack([support[task.support_y == c].mean(0) for c in range(WAYS)])
    expected = F.cross_entropy(-torch.cdist(queries, means).square(), task.query_y)
    # Whatever engine comes first.
    engines = [Loop(), Threads(), *([VMap()] if name != "gru" else [])]  # torch.func has no recurrent layers.
    results = [engine.meta_gradient(ProtoNet(net, WAYS), tasks, TRAINING) for engine in engines]
    torch.testing.assert_close(results[0].losses[1], expected)
    for more in results[1:]:
        torch.testing.assert_close(more.grads, results[0].grads)
    torch.testing.assert_close(learner.meta_loss(task, TRAINING)[0], expected, rtol=1e-9, atol=1e-9)
    shared = {id(p) for m in net.modules() if m not in set(head.modules()) for p in m.parameters(recurse=False)}
    names = {f"module.net.{n}" for n, p in net.named_parameters() if id(p) in shared}
    assert set(learner.outer_params()) == names == set(results[0].grads)


@pytest.mark.parametrize("name", [name for name in NETS if name != "layer norm after"])
def test_the_linear_head_is_fitted_to_what_the_head_is_given(name, tasks):
    net, head = built(name)
    task = tasks.select(0)
    learner = LinearHead(net, WAYS, 4, steps=3)
    if name in ("first", "attention pooling"):  # Its width is not that of the layer that is registered last.
        with pytest.raises(NetArgumentError, match="give head='head', which should be a Linear layer"):
            learner.meta_loss(task, TRAINING)
        learner = LinearHead(net, WAYS, 4, steps=3, head="head")
    x, y = torch.cat([task.support_x, task.query_x]), torch.cat([task.support_y, task.query_y])
    loss = learner.meta_loss(task, TRAINING)[0]
    torch.testing.assert_close(loss, F.cross_entropy(learner.classifier(given(net, head, x)), y))
    features = F.pad(given(net, head, task.support_x), (0, 1), value=1.0)
    weight = torch.zeros(WAYS, features.shape[1], dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        inner = F.cross_entropy(features @ weight.mT, task.support_y)
        rate = 1 / features.square().sum(1).mean()
        weight = weight - rate * torch.autograd.grad(inner, weight, create_graph=True)[0]
    found = learner.adapt(task.support_x, task.support_y, Phase()).params["head"]
    torch.testing.assert_close(found, weight)


def test_a_head_that_cannot_be_found_is_asked_for(tasks):
    task = tasks.select(0)

    class Cosine(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.weight = nn.Linear(WIDTH, 6), nn.Parameter(torch.randn(WAYS, 6))

        def forward(self, x):
            return self.body(x.mean(1)) @ self.weight.T

    for kind in (ANIL, BOIL):
        with pytest.raises(NetArgumentError, match=r"parameter 'weight' after 'body', the last layer .* by head="):
            kind(Cosine().double()).meta_loss(task, TRAINING)
        with pytest.raises(NetArgumentError, match=rf"{kind.__name__}: head: the net has no layer 'haed'.*'head'"):
            kind(built("plain")[0], head="haed")
        with pytest.raises(NetArgumentError, match="never calls its layer 'spare'"):
            kind(built("last unused")[0], head="spare").meta_loss(task, TRAINING)
        # Rates by layer are made before an example is seen.
        net = built("last unused")[0]
        with pytest.raises(NetArgumentError, match="for which the rule was made; give head='head'"):
            kind(net, improvements=Improvements(layer_step_rates=True)).meta_loss(task, TRAINING)
        kind(net, improvements=Improvements(layer_step_rates=True), head="head").meta_loss(task, TRAINING)
    with pytest.raises(NetArgumentError, match="ANIL: adapt_norms: the head alone is adapted"):
        ANIL(built("plain")[0], adapt_norms=True)


def test_the_head_by_name(tasks):
    net, _ = built("two heads")
    learner = ANIL(net, head="body", inner_lr=0.25, steps=2)
    expected = adapted(net, {id(p) for p in net.body.parameters()}, tasks.select(0))
    torch.testing.assert_close(learner.meta_loss(tasks.select(0), TRAINING)[0], expected)


def test_a_look_at_the_net_leaves_no_trace(tasks):
    """A net that draws and counts in evaluation too."""

    def run(net, x):
        net.calls += 1
        return plain(net, F.dropout(x, 0.5, training=True))

    net = body_and_head(run)
    net.calls = 0
    learner = ANIL(net.double())
    state = torch.get_rng_state()
    learner.look_at(tasks.support_x[0])
    assert learner.head == "head" and learner.module.net.calls == 0
    assert torch.equal(state, torch.get_rng_state())


def test_warps_are_not_put_after_the_layer_that_runs_last(tasks):
    net, _ = built("first")
    with pytest.raises(NetArgumentError, match=r"WarpMAML: head: 'head' is the last layer .* give head='head'"):
        WarpMAML(net).meta_loss(tasks.select(0), TRAINING)
    WarpMAML(net, head="body").meta_loss(tasks.select(0), TRAINING)
    learner = WarpMAML(net, head="head")
    learner.meta_loss(tasks.select(0), TRAINING)
    assert [n for n in learner.outer_params() if n not in MAML(net).outer_params()][:1] == ["module.net.body.1.weight"]
