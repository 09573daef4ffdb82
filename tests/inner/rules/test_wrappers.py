"""Schedules and hyperparameters by tensor."""

from __future__ import annotations

import pytest
import torch

from metahpo.errors import NetError
from metahpo.inner import SGD, Adam, ByLayer, LayerStepRates, Scheduled

lr_scheduler = torch.optim.lr_scheduler


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def start():
    return {"a": torch.randn(3), "b": torch.randn(2)}


def grads_of(params):
    return {name: p.cos() for name, p in params.items()}


def run(rule, params, steps):
    state = rule.init(params)
    for step in range(steps):
        params, state = rule(params, grads_of(params), state, step)
    return params


@pytest.mark.parametrize(
    ("factors", "every", "schedule"),
    [
        ([1, 0.5, 0.25], 4, lambda optimizer: lr_scheduler.StepLR(optimizer, 4, 0.5)),
        ([1, 1, 0.1, 0.1, 0.1, 0.01], 2, lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [4, 10], 0.1)),
    ],
)
def test_schedule_equals_torchs(factors, every, schedule):
    params = start()
    twins = {name: p.clone().requires_grad_() for name, p in params.items()}
    twin = torch.optim.Adam(twins.values(), lr=0.3)
    scheduler = schedule(twin)
    for _ in range(12):
        for p in twins.values():
            p.grad = p.detach().cos()
        twin.step()
        scheduler.step()
    params = run(Scheduled(Adam(0.3), factors, every), params, 12)
    for name, p in params.items():
        torch.testing.assert_close(p, twins[name].detach(), rtol=1e-12, atol=1e-12)


def test_constant_tables_change_nothing():
    params = start()
    plain = run(Adam(0.3, weight_decay=0.1), params, 6)
    rule = ByLayer(Adam(0.3, weight_decay=0.1), params, phases=3, steps=6)
    assert {name: tuple(p.shape) for name, p in rule.named_parameters()} == dict.fromkeys(
        ["lr", "beta1", "beta2", "eps", "weight_decay"], (2, 3)
    )
    assert all(p.requires_grad for p in rule.parameters())
    for name, p in run(rule, params, 6).items():
        assert torch.equal(p, plain[name])


def test_tables_give_each_tensor_and_phase_its_own():
    # 5 steps in 2 phases: 3 and 2; steps after the fifth stay in the last phase.
    rule = ByLayer(SGD(0.0), ["b", "a"], phases=2, steps=5)
    rates = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    scheduled = Scheduled(rule, [1.0, 10.0], every=6)
    zeros, ones = ({name: function(2) for name in "ab"} for function in (torch.zeros, torch.ones))
    found = []
    for step in range(8):
        params, _ = torch.func.functional_call(scheduled, {"rule.lr": rates}, (zeros, ones, None, step))
        found.append((-params["a"][0].item(), -params["b"][1].item()))
    assert found == [(3, 1)] * 3 + [(4, 2)] * 3 + [(40, 20)] * 2
    assert [name for name, _ in scheduled.named_parameters()] == ["factors", "rule.lr"]
    assert rule.by_name()["a"].tolist() == [0, 0]


def test_what_does_not_fit_is_refused():
    with pytest.raises(NetError, match="no row for 'c'; it was made for a, b"):
        ByLayer(SGD(0.1), ["a", "b"])({"c": torch.ones(1)}, {"c": torch.ones(1)}, None, 0)
    with pytest.raises(NetError, match="3 phases need at least as many steps, found steps=2"):
        ByLayer(SGD(0.1), ["a"], phases=3, steps=2)
    with pytest.raises(NetError, match=r"names should be a list .* all different, found"):
        ByLayer(SGD(0.1), ["a", "a"])
    with pytest.raises(NetError, match=r"scalar hyperparameters, such as .*, found ByLayer"):
        ByLayer(ByLayer(SGD(0.1), ["a"]), ["a"])
    with pytest.raises(NetError, match="found LayerStepRates"):
        Scheduled(LayerStepRates(["a"], 1, 0.1), [1.0])
    with pytest.raises(NetError, match="list of at least one number, found"):
        Scheduled(SGD(0.1), [])
