"""Every rule against its twin in torch.optim, step by step."""

from __future__ import annotations

import pytest
import torch

from metahpo.errors import NetError
from metahpo.inner import SGD, Adadelta, Adagrad, Adam, AdamW, RMSprop

optim = torch.optim
CASES = [
    (SGD, optim.SGD, {"lr": 0.1}),
    (SGD, optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (SGD, optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    (SGD, optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "nesterov": True}),
    (SGD, optim.SGD, {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}),
    (Adagrad, optim.Adagrad, {"lr": 0.3}),
    (Adagrad, optim.Adagrad, {"lr": 0.3, "lr_decay": 0.1, "weight_decay": 0.05, "initial_accumulator_value": 0.2}),
    (RMSprop, optim.RMSprop, {"lr": 0.02, "eps": 1e-4}),
    (RMSprop, optim.RMSprop, {"lr": 0.02, "alpha": 0.8, "momentum": 0.7, "weight_decay": 0.05}),
    (RMSprop, optim.RMSprop, {"lr": 0.02, "alpha": 0.8, "momentum": 0.7, "centered": True, "eps": 1e-3}),
    (Adadelta, optim.Adadelta, {"lr": 1.0}),
    (Adadelta, optim.Adadelta, {"lr": 3.0, "rho": 0.7, "eps": 1e-3, "weight_decay": 0.05}),
    (Adam, optim.Adam, {"lr": 0.05}),
    (Adam, optim.Adam, {"lr": 0.05, "betas": (0.5, 0.8), "eps": 1e-3, "weight_decay": 0.05}),
    (Adam, optim.Adam, {"lr": 0.05, "betas": (0.5, 0.6), "amsgrad": True}),
    (AdamW, optim.AdamW, {"lr": 0.05}),
    (AdamW, optim.AdamW, {"lr": 0.05, "betas": (0.5, 0.6), "weight_decay": 0.3, "amsgrad": True}),
]


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def loss(params, step):
    """Not convex. The gradient of ``idle`` is always zero, that of ``late`` until the tenth step."""
    w, late = params["w"], params["late"]
    return (
        (w.sin() * torch.arange(1.0, 4)).sum() + (step >= 10) * (w.sum() + late - 1.7) ** 2 + 0 * params["idle"].sum()
    )


@pytest.mark.parametrize(("ours", "theirs", "settings"), CASES)
def test_twenty_steps(ours, theirs, settings):
    start = {"w": torch.randn(3), "late": torch.zeros(()), "idle": torch.randn(2)}
    twins = {name: p.clone().requires_grad_() for name, p in start.items()}
    twin = theirs(twins.values(), **settings)
    betas = dict(zip(("beta1", "beta2"), settings.get("betas", ())))
    rule = ours(**{name: value for name, value in settings.items() if name != "betas"}, **betas)
    params, state = start, rule.init(start)
    for step in range(20):
        twin.zero_grad()
        loss(twins, step).backward()
        twin.step()
        params, state = rule(params, torch.func.grad(loss)(params, step), state, step)
        for name, p in params.items():
            torch.testing.assert_close(p, twins[name].detach(), rtol=1e-12, atol=1e-12)
    assert not torch.equal(params["late"], start["late"])


def test_an_absent_hyperparameter_is_no_parameter_and_no_state():
    rule = SGD(0.1, learnable=True)
    assert list(rule.state_dict()) == ["lr"]
    assert rule.lr.requires_grad
    assert rule.init({"w": torch.zeros(2)}) is None
    rule = SGD(0.1, momentum=0.0, weight_decay=0.0)
    assert list(rule.state_dict()) == ["lr", "momentum", "weight_decay"]
    assert not any(p.requires_grad for p in rule.parameters())
    assert set(rule.init({"w": torch.zeros(2)})["w"]) == {"momentum"}


@pytest.mark.parametrize("settings", [{"nesterov": True}, {"dampening": 0.1}])
def test_sgd_refuses_what_needs_a_momentum(settings):
    with pytest.raises(NetError, match=f"{next(iter(settings))} needs a momentum"):
        SGD(0.1, **settings)
    with pytest.raises(NetError, match="without dampening"):
        SGD(0.1, momentum=0.9, dampening=0.1, nesterov=True)
