"""Rules that use the curvature, against closed forms and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from metahpo.errors import NetError
from metahpo.inner import (
    LBFGS,
    ConjugateGradients,
    Every,
    GaussNewton,
    LevenbergMarquardt,
    Mixed,
    Newton,
    Sqrt,
    unroll,
)
from metahpo.inner.linear_solve import solve


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def outputs(params, batch):
    """Two layers; the batch holds inputs, targets and a weight of the decay."""
    return torch.tanh(batch["x"] @ params["first"]) @ params["second"]


def criterion(z, batch):
    return (0.5 * (z - batch["y"]).pow(2) + 0.1 * z.pow(4)).mean()


def inner_loss(params, carry, batch, step):
    decay = sum(p.pow(2).sum() for p in params.values())
    return criterion(outputs(params, batch), batch) + batch.get("decay", 0.0) * decay, carry


def batch(**more):
    x = torch.linspace(-2, 2, 16).view(8, 2).sin()
    return {"x": x, "y": (3 * x[:, 0]).cos(), **more}


def start():
    return {"first": torch.tensor([[0.5, -0.3], [0.2, 0.8]]), "second": torch.tensor([0.7, -0.4])}


def least_squares():
    """Rosenbrock's function as residuals."""

    def outputs(params, batch):
        x, y = params["w"]
        return torch.stack([10 * (y - x**2), 1 - x])

    def criterion(z, batch):
        return 0.5 * z.pow(2).sum()

    return outputs, criterion


RULES = {
    "newton": lambda: Newton(0.8, damping=0.7),
    "gauss-newton": lambda: GaussNewton(outputs, criterion, 0.8, damping=0.1),
    "levenberg-marquardt": lambda: LevenbergMarquardt(outputs, criterion, damping=0.3),
    "lbfgs": lambda: LBFGS(0.5, history=2),
}


def outer(rule, hyper, decay, **how):
    def update(*arguments):
        return functional_call(rule, hyper, arguments)

    update.init, update.needs_loss = rule.init, rule.needs_loss
    params = unroll(inner_loss, update if hyper else rule, start(), [batch(decay=decay)] * 4, **how).params
    return params["first"].sin().sum() + params["second"].pow(2).sum()


@pytest.mark.parametrize("name", RULES)
def test_hyperparameters_and_the_loss_pass_finite_differences(name):
    rule = RULES[name]()
    hyper = {name: p.detach().clone().requires_grad_() for name, p in rule.named_parameters()}
    decay = torch.tensor(0.02, requires_grad=True)

    def function(decay, *values):
        return outer(rule, dict(zip(hyper, values)), decay)

    assert torch.autograd.gradcheck(function, (decay, *hyper.values()), eps=1e-6, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_all_ways_through_the_loop_agree(name):
    rule = RULES[name]()
    for p in rule.parameters():
        p.requires_grad_()
    decay = torch.tensor(0.02, requires_grad=True)
    hyper = {name: p.detach() for name, p in rule.named_parameters()}
    wanted = [decay, *rule.parameters()]
    expected = torch.autograd.grad(outer(rule, {}, decay), wanted)
    for how in ({"remat": Every(3)}, {"remat": Sqrt()}, {"gradient": Mixed()}, {"gradient": Mixed(), "remat": Sqrt()}):
        found = torch.autograd.grad(outer(rule, {}, decay, **how), wanted)
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=lambda text, how=how: f"{how}: {text}")
    ours = torch.func.grad(lambda decay: outer(rule, hyper, decay))(decay.detach())
    torch.testing.assert_close(ours, expected[0], rtol=1e-9, atol=1e-11)
    tangents = (torch.tensor(1.5), {name: torch.tensor(-0.5) for name in hyper})
    _, found = torch.func.jvp(lambda decay, hyper: outer(rule, hyper, decay), (decay.detach(), hyper), tangents)
    torch.testing.assert_close(found, 1.5 * expected[0] - 0.5 * sum(expected[1:]), rtol=1e-9, atol=1e-11)
    decays = torch.tensor([0.0, 0.02, 0.1])
    slopes = torch.func.vmap(torch.func.grad(lambda decay: outer(rule, hyper, decay)))(decays)
    torch.testing.assert_close(slopes[1], expected[0], rtol=1e-9, atol=1e-11)
    assert (slopes.diff().abs() > 1e-4).all()
