"""A module registered under several names is one module: to every engine, learner and strategy."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metahpo.functional import FunctionalModule
from metahpo.hypergrad import CG, PES, FiniteDifference, Forward, Implicit, Unroll
from metahpo.inner import SGD, Every, InnerProblem, Mixed, Reverse, rule_hparams
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
from metahpo.training.engines import Loop, Threads, Trace, VMap
from metahpo.tuning import tune_decay, tune_rates

TRAINING = Phase(training=True)
# Recording is slow, and first order is part of second.
RUNS = [*itertools.product((Loop, Threads, VMap), (True, False)), (Trace, False)]


class TwoNames(nn.Module):
    """A backbone that also stands in a sequence."""

    def __init__(self, twice: bool = True):
        super().__init__()
        backbone = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
        if twice:
            self.backbone = backbone
        self.features = nn.Sequential(backbone, nn.Tanh())
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def used_twice() -> nn.Module:
    """A layer that runs twice."""
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3))


def small_tasks(count: int = 2) -> Task:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, 4, generator=generator, dtype=torch.float64)
    y = torch.arange(3).repeat(count, 2)
    return Task(x, y, x.flip(2), y)


def by_plain_loop(net: nn.Module, tasks: Task, steps: int, lr: float, first_order: bool) -> dict[str, Tensor]:
    """The meta-gradient of all parameters: modules whose weights are plain attributes, set anew in each step."""
    net = copy.deepcopy(net).train()
    params = dict(net.named_parameters())
    places = [
        (module, key, next(n for n, p in params.items() if p is old))
        for module in net.modules()
        for key, old in module._parameters.items()
        if old is not None
    ]
    for module, key, _ in places:
        del module._parameters[key]
    total = {name: torch.zeros_like(p) for name, p in params.items()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        for module, key, name in places:
            setattr(module, key, weights[name].view_as(weights[name]))
        return F.cross_entropy(net(x), y)

    for index in range(len(tasks.query_x)):
        task, weights = tasks.select(index), params
        for _ in range(steps):
            grads = torch.autograd.grad(
                loss(weights, task.support_x, task.support_y), list(weights.values()), create_graph=not first_order
            )
            weights = {name: w - lr * g for (name, w), g in zip(weights.items(), grads)}
        value = loss(weights, task.query_x, task.query_y) / len(tasks.query_x)
        for name, grad in zip(params, torch.autograd.grad(value, list(params.values()))):
            total[name] += grad
    return total


def net_with(names: int):
    torch.manual_seed(0)
    return TwoNames(twice=names == 2).double()


@pytest.mark.parametrize(("engine", "first_order"), RUNS, ids=str)
@pytest.mark.parametrize("kind", [TwoNames, used_twice])
def test_meta_gradients_are_those_of_a_plain_loop(engine, first_order, kind):
    torch.manual_seed(0)
    net, tasks = kind().double(), small_tasks()
    expected = by_plain_loop(net, tasks, 2, 0.25, first_order)
    learner = MAML(net, steps=2, inner_lr=0.25, first_order=first_order, adapt_norms=True).double()
    before = {name: p.clone() for name, p in learner.named_parameters()}
    runner = engine()
    for _ in range(2):
        found = runner.meta_gradient(learner, tasks, TRAINING).grads
        for name, grad in expected.items():
            torch.testing.assert_close(found[f"module.net.{name}"].view_as(grad), grad, rtol=0, atol=1e-12)
    assert all(torch.equal(p, before[name]) for name, p in learner.named_parameters())


@pytest.mark.parametrize(("engine", "first_order"), RUNS, ids=str)
def test_so_are_those_of_learn2learns_own_net(engine, first_order):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        l2l = pytest.importorskip("learn2learn")
    torch.manual_seed(0)
    net = l2l.vision.models.OmniglotCNN(3, hidden_size=2, layers=1).double()
    x = torch.randn(2, 3, 1, 28, 28, dtype=torch.float64)
    y = torch.arange(3).repeat(2, 1)
    tasks = Task(x, y, x.flip(3), y)
    learner = MAML(net, steps=2, inner_lr=0.125, first_order=first_order, adapt_norms=True).double()
    found = engine().meta_gradient(learner, tasks, TRAINING).grads
    for name, grad in by_plain_loop(net, tasks, 2, 0.125, first_order).items():
        torch.testing.assert_close(found[f"module.net.{name}"].view_as(grad), grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "gradient, remat", [(Mixed(), Every(1)), (Mixed("func"), Every(2)), (Reverse(), Every(1))], ids=str
)
def test_nor_does_memory_saved_change_them(gradient, remat):
    net, tasks = net_with(2), small_tasks()
    learner = MAML(net, steps=2, inner_lr=0.25, adapt_norms=True, gradient=gradient, remat=remat).double()
    found = Loop().meta_gradient(learner, tasks, TRAINING).grads
    for name, grad in by_plain_loop(net, tasks, 2, 0.25, False).items():
        torch.testing.assert_close(found[f"module.net.{name}"].view_as(grad), grad, rtol=0, atol=1e-12)


LEARNERS = {
    "anil": ANIL,
    "boil": BOIL,
    "cavia": CAVIA,
    "imaml": IMAML,
    "linear_head": lambda net: LinearHead(net, 3, 3, steps=3),
    "maml_pp": MAMLPlusPlus,
    "meta_curvature": MetaCurvature,
    "meta_sgd": MetaSGD,
    "proto_net": lambda net: ProtoNet(net, 3),
    "reptile": Reptile,
    "warp_maml": WarpMAML,
}


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("engine", [Loop, VMap], ids=lambda engine: engine.name)
def test_every_learner_gives_the_same_for_one_name_and_for_two(name, engine):
    results = []
    for names in (1, 2):
        net = net_with(names)
        torch.manual_seed(1)
        learner = LEARNERS[name](net).double()
        grads = engine().meta_gradient(learner, small_tasks(), TRAINING)
        outputs = engine().evaluate(learner, small_tasks(), Phase())[1]["after"]
        results.append([grads.losses, outputs, *grads.grads.values()])
    assert len(results[0]) == len(results[1])
    for one, two in zip(*results):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


STRATEGIES = {
    "unroll": Unroll(),
    "unroll mixed": Unroll(Mixed(), Every(2)),
    "forward": Forward(),
    "implicit": Implicit(CG(steps=5)),
    "finite difference": FiniteDifference(),
    "pes": PES(4, 0.01),
}


def hypergradient(name: str, module: FunctionalModule) -> list[Tensor]:
    """The outer value and its gradients."""
    task, buffers = small_tasks(1).select(0), module.buffers_by_name()

    def loss(params, hparams, batch):
        squares = torch.stack([p.square().sum() for p in params.values()]).sum()
        return F.cross_entropy(module.apply_with(params, buffers, batch[0])[0], batch[1]) + hparams["decay"] * squares

    def outer(params, hparams):
        return F.cross_entropy(module.apply_with(params, buffers, task.query_x)[0], task.query_y)

    rule = SGD(0.1).double()
    hparams = {"decay": torch.tensor(0.01, dtype=torch.float64), **({} if name == "implicit" else rule_hparams(rule))}
    params = {n: p.detach() for n, p in module.params().items()}
    torch.manual_seed(0)
    batches = [(task.support_x, task.support_y)] * 3
    found = STRATEGIES[name](InnerProblem(loss), rule, outer, params, hparams, batches)
    return [found.value, *found.grads.values()]


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_gives_the_same_for_one_name_and_for_two_and_again(name):
    first = hypergradient(name, FunctionalModule(net_with(1)))
    module = FunctionalModule(net_with(2))
    for _ in range(2):
        for one, two in zip(first, hypergradient(name, module)):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def labelled(count: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, torch.arange(count) % 3


@pytest.mark.parametrize("kind", ["rates", "decay"])
def test_tunings_give_the_same_for_one_name_and_for_two(kind):
    rows = []
    for names in (1, 2):
        train, val = labelled(12, 0), labelled(9, 1)
        if kind == "rates":
            options = {"steps": 3, "phases": 1, "iterations": 2, "by": "all", "fresh": False}
            tuned = tune_rates(net_with(names), F.cross_entropy, [train] * 3, [val], **options)
        else:
            tuned = tune_decay(net_with(names), F.cross_entropy, train, val, steps=4, every=2, batch=6, by="all")
        rows.append([value for row in tuned.history for value in row.values()])
    assert rows[0] == pytest.approx(rows[1], rel=1e-9)
