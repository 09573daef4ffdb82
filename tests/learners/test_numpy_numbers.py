"""NumPy's numbers are numbers: with them every learner and rule is what it is with Python's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from metahpo.errors import NetError
from metahpo.inner import LBFGS, SGD, Adam, ByLayer, Every, LevenbergMarquardt, Scheduled
from metahpo.learners import CAVIA, IMAML, MAML, Improvements, LinearHead, MetaCurvature, MetaSGD, ProtoNet, Reptile
from metahpo.tasks import Task
from metahpo.training.engines import Loop

NAMES = ["0.weight", "0.bias", "3.weight", "3.bias"]
SETTINGS = (3, 0, True, True, True)
MAKERS = {
    "maml": lambda n, net: MAML(net, steps=n(2), inner_lr=n(0.1), learn_lr=n(True), first_order=n(True)),
    "improvements": lambda n, net: MAML(net, steps=n(2), improvements=Improvements(*map(n, SETTINGS))),
    "remat": lambda n, net: MAML(net, steps=n(2), remat=Every(n(1))),
    "meta_sgd": lambda n, net: MetaSGD(net, steps=n(2), inner_lr=n(0.1)),
    "meta_curvature": lambda n, net: MetaCurvature(net, steps=n(2), inner_lr=n(0.1)),
    "imaml": lambda n, net: IMAML(net, steps=n(2), inner_lr=n(0.1), strength=n(2.0), cg_steps=n(3)),
    "reptile": lambda n, net: Reptile(net, steps=n(2), inner_lr=n(0.1), minibatches=n(2), eval_steps=n(2)),
    "cavia": lambda n, net: CAVIA(net, context=n(5), steps=n(2)),
    "proto_net": lambda n, net: ProtoNet(net, n(3)),
    "linear_head": lambda n, net: LinearHead(net, n(3), n(3), steps=n(2), inner_lr=n(1.0)),
    "sgd": lambda n, net: MAML(net, steps=2, rule=SGD(n(0.1), n(0.9), weight_decay=n(0.01), learnable=n(True))),
    "adam": lambda n, net: MAML(net, steps=2, rule=Adam(n(0.1), n(0.9), n(0.99), n(1e-8), amsgrad=n(True))),
    "by_layer": lambda n, net: MAML(net, steps=2, rule=ByLayer(SGD(n(0.1)), NAMES, n(2), n(2), learnable=n(True))),
    "scheduled": lambda n, net: MAML(net, steps=2, rule=Scheduled(SGD(n(0.1)), [n(1.0), n(0.5)], n(1))),
    "lbfgs": lambda n, net: MAML(net, steps=2, rule=LBFGS(n(0.1), n(3))),
}


def numpy_of(value):
    return {bool: np.bool_, int: np.int64, float: np.float64}[type(value)](value)


@pytest.mark.parametrize("name", MAKERS)
def test_numpy_numbers_give_the_same_outer_gradient(name):
    x, y = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(3).repeat(1, 2)
    results = []
    for number in (lambda value: value, numpy_of):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
        learner = MAKERS[name](number, net)
        found = Loop().meta_gradient(learner, Task(x, y, x.flip(2), y), learner.training_phase(0))
        results.append([found.loss, *found.grads.values()])
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(one, two) for one, two in zip(*results))


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: MAML(nn.Linear(4, 3), inner_lr=float("nan")), "MAML: inner_lr should be a number of.*found nan"),
        (lambda: MAML(nn.Linear(4, 3), steps=2.5), "MAML: steps should be a whole number of at least 1, found 2.5"),
        (lambda: SGD("fast"), "SGD: lr should be a .*number.*, found 'fast'"),
        (lambda: LevenbergMarquardt(print, print, up="x"), "LevenbergMarquardt: up should be a"),
        (lambda: Improvements(per_step_affine="no"), "Improvements: per_step_affine should be True or False"),
        (lambda: Every(True), "Every: k should be a whole number of at least 1, found True"),
    ],
)
def test_what_is_no_number_is_said_in_a_line(make, line):
    with pytest.raises(NetError, match=line):
        make()
