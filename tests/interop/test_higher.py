"""Optimisers of higher as update rules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from metahpo.errors import NetError
from metahpo.inner import SGD, Adadelta, Adagrad, Adam, Every, Mixed, NoRemat, Reverse, RMSprop, unroll
from metahpo.interop import HigherRule
from metahpo.learners import MAML
from metahpo.nets import MLP
from metahpo.tasks import Sinusoid
from metahpo.training.engines import Loop, Threads, VMap

optim = torch.optim
pytestmark = [
    pytest.mark.usefixtures("higher", "float64"),
    pytest.mark.filterwarnings("ignore:Differentiable (RMSprop|Rprop)"),
]
CASES = [
    (optim.SGD, SGD, {"lr": 0.1}),
    (optim.SGD, SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    (optim.SGD, SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (optim.Adagrad, Adagrad, {"lr": 0.3, "lr_decay": 0.1, "initial_accumulator_value": 0.2}),
    (optim.RMSprop, RMSprop, {"lr": 0.02, "alpha": 0.8, "momentum": 0.7, "weight_decay": 0.05}),
    (optim.RMSprop, RMSprop, {"lr": 0.02, "alpha": 0.8, "centered": True, "eps": 1e-3}),
    (optim.Adadelta, Adadelta, {"lr": 3.0, "rho": 0.7, "eps": 1e-3, "weight_decay": 0.05}),
    # higher adds eps at another place than torch does today.
    (optim.Adam, Adam, {"lr": 0.05, "betas": (0.5, 0.8), "eps": 1e-14, "weight_decay": 0.05}),
    (optim.Adam, Adam, {"lr": 0.05, "betas": (0.5, 0.6), "eps": 1e-14, "amsgrad": True}),
]


def loss(params, carry, batch, step):
    """Not convex; the gradient is different at every step."""
    return (params["w"].sin() * batch).sum() + (params["w"].sum() + params["b"] - step) ** 2, carry


def outcome(rule, learnt, start, **options):
    """(parameters after every step, gradient of the last loss by the start and by the rate ``learnt``)."""
    start = {name: p.clone().requires_grad_() for name, p in start.items()}
    batches = torch.linspace(0.5, 2.0, 12).split(2)
    trajectory = unroll(loss, rule, start, batches, **options)
    value, _ = loss(trajectory.params, None, batches[0], 1)
    return trajectory.steps, torch.autograd.grad(value, [*start.values(), learnt])


@pytest.mark.parametrize(("optimizer", "ours", "settings"), CASES)
def test_steps_and_outer_gradients_are_those_of_our_rules(optimizer, ours, settings):
    start = {"w": torch.tensor([0.3, -1.2]), "b": torch.tensor(0.7)}
    rule = HigherRule(optimizer, learn_lr=True, **settings)
    betas = dict(zip(("beta1", "beta2"), settings.get("betas", ())))
    twin = ours(**{name: v for name, v in settings.items() if name != "betas"}, **betas, learnable=True)
    steps, grads = outcome(rule, rule.lr, start)
    twins, twin_grads = outcome(twin, twin.lr, start)
    torch.testing.assert_close(steps, twins, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads, twin_grads, rtol=1e-8, atol=1e-8)
    assert all(g.abs().max() > 1e-6 for g in grads)


@pytest.mark.parametrize("optimizer", [optim.Adamax, optim.ASGD, optim.Rprop])
def test_steps_are_those_of_torch_where_we_have_no_such_rule(optimizer):
    start = {"w": torch.tensor([0.3, -1.2]), "b": torch.tensor(0.7)}
    twins = {name: p.clone().requires_grad_() for name, p in start.items()}
    twin = optimizer(twins.values(), lr=0.05)
    batches = torch.linspace(0.5, 2.0, 12).split(2)
    trajectory = unroll(loss, HigherRule(optimizer, lr=0.05), start, batches)
    for step, batch in enumerate(batches):
        twin.zero_grad()
        loss(twins, None, batch, step)[0].backward()
        twin.step()
        torch.testing.assert_close(trajectory.steps[step], {n: p.detach() for n, p in twins.items()})


def test_the_state_is_passed_and_never_written():
    rule = HigherRule(optim.Adagrad, lr=0.1)
    params, grads = {"w": torch.ones(2)}, {"w": torch.tensor([1.0, -2.0])}
    first = rule.init(params)
    once, _ = rule(params, grads, first, 0)
    _, second = rule(once, grads, first, 0)
    again, _ = rule(params, grads, first, 0)
    assert torch.equal(once["w"], again["w"])
    assert (first["w"]["step"], second["w"]["step"]) == (0, 1)
    assert torch.equal(params["w"], torch.ones(2))


@pytest.mark.parametrize("options", [{"gradient": Mixed()}, {"remat": Every(2)}], ids=["mixed", "remat"])
def test_other_ways_through_the_inner_loop(options):
    rule = HigherRule(optim.Adam, lr=0.05, learn_lr=True)
    start = {"w": torch.tensor([0.3, -1.2]), "b": torch.tensor(0.7)}
    found = outcome(rule, rule.lr, start, **{"gradient": Reverse(), "remat": NoRemat(), **options})
    torch.testing.assert_close(found, outcome(rule, rule.lr, start))


def test_maml_with_it_in_the_engines():
    net = MLP([1], 1, [8])
    learner, twin = (
        MAML(net, steps=3, loss=F.mse_loss, rule=rule)
        for rule in (HigherRule(optim.Adam, lr=0.05, eps=1e-14, learn_lr=True), Adam(0.05, eps=1e-14, learnable=True))
    )
    tasks, phase = Sinusoid(shots=5, queries=5).batch(range(3)).to(torch.float64), learner.training_phase(0)
    twins = Loop().meta_gradient(twin, tasks, phase).grads
    assert "rule.lr" in learner.outer_params()
    for engine in (Loop(), VMap(), Threads()):
        grads = engine.meta_gradient(learner, tasks, phase).grads
        torch.testing.assert_close(grads, {name: twins[name] for name in grads}, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("optimizer", "settings", "message"),
    [
        (optim.AdamW, {}, r"HigherRule\(AdamW\): .*not supported by higher"),
        (optim.SGD, {"beta": 0.9}, r"HigherRule\(SGD\): .*unexpected keyword argument 'beta'"),
        (optim.SGD, {"lr": -1.0}, r"HigherRule\(SGD\): Invalid learning rate"),
        (optim.Adam, {"maximize": True}, "higher does not know maximize, found True"),
        (optim.ASGD, {"learn_lr": True}, "higher does not differentiate by the rate of ASGD"),
    ],
)
def test_what_higher_cannot(optimizer, settings, message):
    with pytest.raises(NetError, match=message):
        HigherRule(optimizer, **settings)
