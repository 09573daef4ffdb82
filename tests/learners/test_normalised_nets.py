"""Normalisations of every kind in every learner: against the same learner on torch's own batch norm where they are that
in another form, and against plain PyTorch loops where they are something else."""

from __future__ import annotations

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metahpo.errors import NetError
from metahpo.functional.copies import copied
from metahpo.learners import (
    ANIL,
    BOIL,
    CAVIA,
    IMAML,
    MAML,
    LinearHead,
    MAMLPlusPlus,
    MetaCurvature,
    MetaSGD,
    Phase,
    ProtoNet,
    Reptile,
    WarpMAML,
)
from metahpo.tasks import Task
from metahpo.training.engines import Loop, Threads, VMap

STEPS, RATE, COUNT, STRENGTH = 2, 0.25, 2, 8.0
BY_GRADIENT = (ANIL, BOIL, CAVIA, IMAML, MAML, MAMLPlusPlus, MetaCurvature, MetaSGD, Reptile, WarpMAML)
OPTIONS = {kind: {"steps": STEPS} for kind in BY_GRADIENT}
OPTIONS |= {ProtoNet: {"ways": 3}, LinearHead: {"ways": 3, "classes": 3, "steps": 3}}


class ByFunction(nn.BatchNorm1d):
    """As timm's BatchNormAct2d, whose forward method calls ``F.batch_norm``."""

    def forward(self, x):
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        training = self.training or self.running_mean is None
        tracked = not self.training or self.track_running_stats
        statistics = (self.running_mean, self.running_var) if tracked else (None, None)
        return F.batch_norm(x, *statistics, self.weight, self.bias, training, self.momentum, self.eps)


class BySuper(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x)


class ByHand(nn.BatchNorm1d):
    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            self.running_mean = torch.lerp(self.running_mean, mean.detach(), self.momentum)
            self.running_var = torch.lerp(self.running_var, x.detach().var(0), self.momentum)
        return (x - mean) / (var + self.eps).sqrt() * self.weight + self.bias


def replaced(norm: nn.Module) -> nn.Module:
    """With a forward method of the one layer alone, as some libraries put it there."""
    old = norm.forward
    norm.forward = types.MethodType(lambda self, x: old.__func__(self, x), norm)
    return norm


SAME = {
    "by function": lambda: ByFunction(4),
    "by function, no statistics": lambda: ByFunction(4, track_running_stats=False),
    "by super": lambda: BySuper(4),
    "by hand": lambda: ByHand(4),
    "replaced": lambda: replaced(nn.BatchNorm1d(4)),
    "sync": lambda: nn.SyncBatchNorm(4),
    "no statistics": lambda: nn.BatchNorm1d(4, track_running_stats=False),
}


def net_with(*layers: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), *layers, nn.Tanh(), nn.Linear(4, 3)).double()


def tasks() -> Task:
    generator = torch.Generator().manual_seed(1)
    x, query = (2 * torch.randn(COUNT, 6, 4, generator=generator, dtype=torch.float64) + 1 for _ in range(2))
    labels = torch.arange(6).repeat(COUNT, 1) % 3
    return Task(x, labels, query, labels)


def results(learner_kind, norm: nn.Module, engine) -> dict[str, Tensor]:
    """What a step of training and then a test give, by name."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        learner = learner_kind(net_with(norm), **OPTIONS[learner_kind]).double()
    trained = engine.meta_gradient(learner, tasks(), learner.training_phase(0))
    learner.update_buffers(trained.metrics["buffers"])
    metrics, outputs = engine.evaluate(learner, tasks(), Phase())
    found = {"losses": trained.losses, **{n: g.flatten() for n, g in trained.grads.items()}, **metrics, **outputs}
    moved = {n: b for n, b in trained.metrics["buffers"].items() if n.rpartition(".")[2] != "num_batches_tracked"}
    return found | {n: b.view(-1, 4) for n, b in moved.items()}


@pytest.mark.parametrize("learner_kind", OPTIONS)
def test_a_batch_norm_in_another_form_is_one_in_every_learner(learner_kind):
    wanted = results(learner_kind, nn.BatchNorm1d(4), Loop())
    assert any("running_mean" in each for each in wanted)
    for kind, make in SAME.items():
        found = results(learner_kind, make(), Loop())
        assert found.keys() == wanted.keys(), kind
        for each, value in wanted.items():
            torch.testing.assert_close(found[each], value, rtol=1e-9, atol=1e-11, msg=f"{kind}: {each}")
    for engine in (Threads(), VMap()):
        found = results(learner_kind, ByFunction(4), engine)
        for each, value in wanted.items():
            torch.testing.assert_close(found[each], value, rtol=1e-9, atol=1e-11)


class Centred(nn.Module):
    """A normaliser of one's own, which writes into its running mean."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.mean.mul_(0.75).add_(0.25 * x.detach().mean(0))
        return (x - self.mean.clone()) * self.weight


class CentredByData(Centred):
    """The same with a new running mean, computed past autograd."""

    def forward(self, x):
        if self.training:
            self.mean = 0.75 * self.mean + 0.25 * x.data.mean(0)
        return (x - self.mean) * self.weight


OTHERS = {
    "instance": lambda: net_with(
        nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, affine=True, track_running_stats=True), nn.Flatten()
    ),
    "spectral": lambda: net_with(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))),
    "spectral, as it was": lambda: net_with(nn.utils.spectral_norm(nn.Linear(4, 4))),
    "one's own": lambda: net_with(Centred()),
    "one's own by data": lambda: net_with(CentredByData()),
}


def descended(net: nn.Module, params, x: Tensor, y: Tensor, away: float = 0.0):
    fast = params
    for _ in range(STEPS):
        distance = torch.stack([(fast[n] - params[n].detach()).square().sum() for n in params]).sum()
        value = F.cross_entropy(functional_call(net, fast, x), y) + away / 2 * distance
        grads = torch.autograd.grad(value, list(fast.values()), create_graph=True)
        fast = {n: p - RATE * g for (n, p), g in zip(fast.items(), grads)}
    return fast


def maml(net, params, task):
    fast = descended(net, params, task.support_x, task.support_y)
    return F.cross_entropy(functional_call(net, fast, task.query_x), task.query_y)


def reptile(net, params, task):
    fast = descended(net, params, *(torch.cat(parts) for parts in (task[::2], task[1::2])))
    value = F.cross_entropy(functional_call(net, fast, task.query_x), task.query_y)
    return value.detach() + sum(((p - p.detach()) * (p - fast[n]).detach()).sum() for n, p in params.items())


def imaml(net, params, task):
    fast = descended(net, params, task.support_x, task.support_y, STRENGTH)
    ended, shapes = copied(net), [p.shape for p in params.values()]

    def named(flat: Tensor):
        parts = flat.split([shape.numel() for shape in shapes])
        return {n: part.view(shape) for n, part, shape in zip(params, parts, shapes)}

    def support_loss(flat: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(copied(ended), named(flat), task.support_x), task.support_y)

    at = torch.cat([p.detach().flatten() for p in fast.values()]).requires_grad_()
    value = F.cross_entropy(functional_call(net, named(at), task.query_x), task.query_y)
    (slope,) = torch.autograd.grad(value, at)
    hessian = torch.autograd.functional.hessian(support_loss, at)
    through = named(STRENGTH * torch.linalg.solve(hessian + STRENGTH * torch.eye(len(at)), slope))
    return value.detach() + sum(((p - p.detach()) * through[n]).sum() for n, p in params.items())


def embedded(net, params, x):
    body = net[:-1]
    return functional_call(body, {n: params[n] for n, _ in body.named_parameters()}, x)


def proto_net(net, params, task):
    support, query = (embedded(net, params, x) for x in (task.support_x, task.query_x))
    means = torch.stack([support[task.support_y == label].mean(0) for label in range(3)])
    return F.cross_entropy(-(query[:, None] - means).square().sum(-1), task.query_y)


def linear_head(net, params, task):
    x, y = (torch.cat(parts) for parts in (task[::2], task[1::2]))
    return F.cross_entropy(embedded(net, params, x) @ HEAD.mT, y)


HEAD = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
GRADIENT = {"steps": STEPS, "inner_lr": RATE, "adapt_norms": True}
LOOPS = {
    "maml": (maml, lambda net: MAML(net, **GRADIENT)),
    "reptile": (reptile, lambda net: Reptile(net, steps=STEPS, inner_lr=RATE, minibatches=1)),
    "imaml": (imaml, lambda net: IMAML(net, strength=STRENGTH, cg_steps=30, **GRADIENT)),
    "proto_net": (proto_net, lambda net: ProtoNet(net, 3)),
    "linear_head": (linear_head, lambda net: with_head(LinearHead(net, 3, 3))),
}


def with_head(learner: LinearHead) -> LinearHead:
    nn.init.zeros_(learner.classifier.bias)
    learner.classifier.weight.data.copy_(HEAD)
    return learner


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", LOOPS)
def test_another_normalisation_trains_and_predicts_as_in_a_plain_loop(name, kind):
    loop, make = LOOPS[name]
    net, grads, losses = OTHERS[kind](), [], []
    learner = make(net).double()
    params = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    for index in range(COUNT):
        twin = copy.deepcopy(net)
        losses.append(loop(twin, params, tasks().select(index)))
        grads.append(torch.autograd.grad(losses[-1], list(params.values()), materialize_grads=True))
    for engine in (Loop(), Threads(), VMap()):
        try:
            found = engine.meta_gradient(learner, tasks(), Phase(training=True))
        except NetError as error:
            assert isinstance(engine, VMap) and "engine vmap cannot run module" in str(error)
            assert kind != "one's own by data"
            continue
        for n, each in zip(params, zip(*grads)):
            grad = found.grads.get(f"module.net.{n}")
            assert grad is not None or n.startswith(str(len(net) - 1))
            if grad is not None:
                torch.testing.assert_close(grad, torch.stack(each).mean(0), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found.losses, torch.stack(losses).detach(), rtol=1e-9, atol=1e-12)
        left = {f"module.net.{n}": b for n, b in twin.named_buffers() if "running" not in n}
        moved = found.metrics["buffers"]
        for n in left.keys() & moved.keys():
            torch.testing.assert_close(moved[n], left[n], rtol=1e-9, atol=1e-12)
        assert moved
    # Tested, after a step of training, in evaluation mode.
    learner.update_buffers(Loop().meta_gradient(learner, tasks(), Phase(training=True)).metrics["buffers"])
    if name == "maml":
        twin = copy.deepcopy(net).eval()
        own = dict(learner.named_buffers())
        for n, b in twin.named_buffers():
            b.copy_(own[f"module.net.{n}"])
        task = tasks().select(0)
        fast = descended(twin, params, task.support_x, task.support_y)
        for engine in (Loop(), Threads()):
            outputs = engine.evaluate(learner, tasks(), Phase())[1]
            for each in ("after", "inductive"):
                torch.testing.assert_close(outputs[each][0], functional_call(twin, fast, task.query_x))
