"""Nets of other types than float32, against the same learner in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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
from metahpo.training.engines import Loop

LEARNERS = {
    kind.__name__: lambda net, kind=kind: kind(net, steps=2)
    for kind in (ANIL, BOIL, IMAML, MAML, MAMLPlusPlus, MetaCurvature, MetaSGD, Reptile, WarpMAML)
}
LEARNERS |= {
    "CAVIA": lambda net: CAVIA(net, steps=2, context=4),
    "ProtoNet": lambda net: ProtoNet(net, 3),
    "LinearHead": lambda net: LinearHead(net, 3, 3, steps=2),
}


def small_net() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.MaxPool2d(2)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3))


def tasks(dtype: torch.dtype) -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 1, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.arange(6).remainder(3).expand(2, 6)
    return Task(x, y, x.roll(1, 1), y.roll(1, 1))


@pytest.fixture(params=["double", "bfloat16", "default"])
def kind(request):
    before = torch.get_default_dtype()
    if request.param == "default":
        torch.set_default_dtype(torch.float64)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_net_of_another_type_gives_the_gradient_of_float64_to_its_rounding(name, kind):
    make = LEARNERS[name]
    torch.manual_seed(1)
    reference = make(small_net()).double()
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float64
    learner = make(small_net().to(dtype))
    learner.load_state_dict(reference.state_dict())
    wanted = Loop().meta_gradient(reference, tasks(torch.float64), Phase(training=True))
    found = Loop().meta_gradient(learner, tasks(dtype), Phase(training=True))
    rounding = 0.2 if kind == "bfloat16" else 1e-10
    assert found.loss.dtype == dtype
    assert float(found.loss) == pytest.approx(float(wanted.loss), rel=rounding)
    # Rates that are learnt in small steps stay in float32 beside a net in bfloat16.
    assert {g.dtype for n, g in found.grads.items() if not n.startswith("rule.rates")} == {dtype}
    gaps = [(found.grads[n].double() - g).norm() for n, g in wanted.grads.items()]
    size = torch.stack([g.norm() for g in wanted.grads.values()]).norm()
    assert float(torch.stack(gaps).norm()) <= rounding * float(size)
    metrics, _ = Loop().evaluate(learner, tasks(dtype), Phase())
    assert torch.isfinite(metrics["loss"]).all()


@pytest.mark.parametrize("name", ["MAML", "MAMLPlusPlus", "MetaSGD", "BOIL"])
def test_the_rates_of_a_float64_net_are_the_number_given(name):
    rates = [p for p in LEARNERS[name](small_net().double()).rule.parameters() if p.dtype == torch.float64]
    assert rates
    assert all(bool((p == 0.1).all()) for p in rates)  # Not 0.10000000149, float32's nearest.


def test_the_rates_of_a_bfloat16_net_stay_float32_and_have_its_gradient():
    # In bfloat16 a step of 1e-4 from 0.1 would be lost.
    learner, x = MAMLPlusPlus(small_net().bfloat16(), steps=2), tasks(torch.bfloat16)
    wanted = MAMLPlusPlus(small_net().bfloat16().double(), steps=2)
    phase = learner.training_phase(0)
    found = Loop().meta_gradient(learner, x, phase).grads["rule.rates"]
    assert found.dtype == learner.rule.rates.dtype == torch.float32
    exact = Loop().meta_gradient(wanted, Task(*(t.double() if t.is_floating_point() else t for t in x)), phase)
    exact = exact.grads["rule.rates"].float()
    assert float((found - exact).norm() / exact.norm()) < 0.1
