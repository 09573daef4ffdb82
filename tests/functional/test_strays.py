from __future__ import annotations

import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metahpo.errors import NetError
from metahpo.functional import FunctionalModule
from metahpo.learners import MAML, LinearHead, Phase, ProtoNet
from metahpo.tasks import Task
from metahpo.training.engines import Loop, Threads, Trace, VMap


class Square(torch.autograd.Function):
    """A product that no torch function of the forward pass shows with its graph."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w.mT, x.mT @ grad


W = torch.eye(3).requires_grad_()


class Net(nn.Module):
    """A layer, and ``self.w`` [3, 3] reached as ``way`` says."""

    def __init__(self, way: str, grad: bool = True):
        super().__init__()
        self.head, self.way, scale = nn.Linear(3, 2), way, torch.eye(3, requires_grad=grad)
        if way in ("list", "custom"):
            self.weights = [scale]
            return
        if way == "global":
            return
        if way == "computed":
            self.scaled = (scale * 2,)
            return
        self.w = nn.Parameter(scale)
        if way == "dict of registered":
            self.table = {"first": self.w}
        elif way == "closure":
            self.product = lambda x: x @ self.w
        elif way == "partial":
            self.product = functools.partial(torch.matmul, other=[self.w][0])
        elif way == "hook":
            self.head.register_forward_pre_hook(lambda module, inputs: inputs[0] @ self.w)
        elif way == "layers in a list":
            self.layers = [nn.Linear(3, 3)]

    def forward(self, x):
        product = {
            "list": lambda: x @ self.weights[0],
            "custom": lambda: Square.apply(x, self.weights[0]),
            "global": lambda: x @ W,
            "computed": lambda: x @ self.scaled[0],
            "dict of registered": lambda: x @ self.table["first"],
            "closure": lambda: self.product(x),
            "hook": lambda: x,
            "layers in a list": lambda: self.layers[0](x @ self.w),
        }[self.way]()
        return self.head(product)


class Lazy(nn.Module):
    """Keeps the weight that it had at its first call."""

    def __init__(self):
        super().__init__()
        self.w, self.kept = nn.Parameter(torch.eye(3, 2)), None

    def forward(self, x):
        self.kept = self.w if self.kept is None else self.kept
        return x @ self.kept


def rebound() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    net.forward = lambda x: net[1](torch.tanh(net[0](x)))
    return net


WAYS = {
    "list": (lambda: Net("list"), r"Net\.weights\[0\], a tensor \[3, 3\]"),
    "a function of its own": (lambda: Net("custom"), r"Net\.weights\[0\]"),
    "global": (lambda: Net("global"), r"-> W, a tensor \[3, 3\]"),
    "computed": (lambda: Net("computed"), r"Net\.scaled\[0\]"),
    "dict": (lambda: Net("dict of registered"), r"Net\.table\['first'\]"),
    "closure": (lambda: Net("closure"), r"Net\.product -> self\.w, a tensor \[3, 3\]"),
    "hook": (lambda: Net("hook"), r"_forward_pre_hooks\[\d+\] -> self\.w, a tensor \[3, 3\]"),
    "layers in a list": (lambda: Net("layers in a list"), r"Net\.layers\[0\]\.(weight|bias), a tensor"),
    "rebound forward": (rebound, r"Sequential\.forward -> net\.\d\.(weight|bias)"),
}


def tasks() -> Task:
    torch.manual_seed(0)
    x, y = torch.randn(2, 4, 3), torch.arange(2).repeat(2, 2)
    return Task(x, y, x.flip(1), y.flip(1))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", [Loop, Threads, VMap, Trace], ids=lambda engine: engine.name)
def test_each_engine_refuses_weights_that_are_not_exchanged_and_names_them(way, engine):
    if way == "a function of its own" and engine in (VMap, Trace):
        pytest.skip("torch.func refuses it")
    make, name = WAYS[way]
    with pytest.raises(NetError, match=name):
        engine().meta_gradient(MAML(make(), steps=1), tasks(), Phase(training=True))


@pytest.mark.parametrize("way", ["list", "closure"])
@pytest.mark.parametrize("engine", [Loop, Threads, VMap], ids=lambda engine: engine.name)
def test_so_does_an_evaluation(way, engine):
    with pytest.raises(NetError, match="would never adapt"):
        engine().evaluate(MAML(WAYS[way][0](), steps=1), tasks(), Phase())


@pytest.mark.parametrize("engine", [Loop, Threads], ids=lambda engine: engine.name)
@pytest.mark.parametrize("first_order", [False, True])
def test_weights_kept_from_the_first_call_are_refused_at_the_second(engine, first_order):
    with pytest.raises(NetError, match="would never adapt"):
        engine().meta_gradient(MAML(Lazy(), steps=2, first_order=first_order), tasks(), Phase(training=True))


class Fine(nn.Module):
    """What a net may do: constants by any way, gradients inside, unused parameters, a bound method of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.unused, self.teacher = nn.Linear(3, 2), nn.Linear(5, 5), [nn.Linear(3, 3)]
        self.constant, self.shape = [torch.eye(3)], [torch.ones(3, requires_grad=True)]
        self.inner = types.MethodType(Fine.layer, self)

    def layer(self, x):
        return self.a(x)

    def forward(self, x):
        with torch.no_grad():
            x = x + 0 * self.teacher[0](x)
        x = x @ self.constant[0] + torch.zeros_like(self.shape[0]) + 0 * self.shape[0].detach()
        if not torch._C._are_functorch_transforms_active():
            point = x.detach().requires_grad_()
            x = x + torch.autograd.grad(point.square().sum(), point, create_graph=True)[0]
        return self.inner(x)


@pytest.mark.parametrize("engine", [Loop, Threads, VMap, Trace], ids=lambda engine: engine.name)
def test_constants_and_what_the_call_makes_are_no_such_weights(engine):
    grads = engine().meta_gradient(MAML(Fine(), steps=2), tasks(), Phase(training=True)).grads
    assert bool(grads["module.net.a.weight"].any()) and not bool(grads["module.net.unused.weight"].any())


def test_only_the_first_two_calls_are_looked_at(monkeypatch):
    looks = []
    real = torch.overrides.TorchFunctionMode.__enter__
    monkeypatch.setattr("metahpo.functional.strays._Strays.__enter__", lambda self: looks.append(1) or real(self))
    module, x = FunctionalModule(nn.Linear(3, 2)), torch.randn(4, 3)
    for _ in range(4):
        F.cross_entropy(module(module.params(), x), torch.zeros(4, dtype=torch.long)).backward()
    assert len(looks) == 2


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("engine", [Loop, Threads, VMap])
@pytest.mark.parametrize("kind", [lambda net: ProtoNet(net, 2), lambda net: LinearHead(net, 2, 2, steps=2)])
def test_a_learner_that_is_only_evaluated_is_looked_at_too(kind, engine):
    def net(grad):
        return nn.Sequential(nn.Linear(3, 3), Net("list", grad), nn.Linear(2, 2))

    x, y = torch.randn(2, 4, 3), torch.arange(4).repeat(2, 1) % 2
    with pytest.raises(NetError, match=r"weights\[0\].*requires grad but is not among the parameters"):
        engine().evaluate(kind(net(True)), Task(x, y, x, y), Phase())
    learner = kind(net(False))  # A constant.
    first, again, third = (engine().evaluate(learner, Task(x, y, x, y), Phase()) for _ in range(3))
    assert not any(t.requires_grad for t in first[1].values())
    for other in (again, third):  # Looked at or not, the numbers are the same.
        torch.testing.assert_close(other, first, rtol=0, atol=0)
