"""The derivative of what rules lead to, in each of their hyperparameters."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from metahpo.inner import (
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    AdamW,
    ByLayer,
    Every,
    Mixed,
    Reverse,
    RMSprop,
    Scheduled,
    Sqrt,
    unroll,
)

STEPS = 6
NAMES = ["w", "late", "idle"]
# eps as large as what the finite differences change, which else jump over all that happens near zero.
RULES = {
    "sgd": lambda: SGD(0.03, momentum=0.9, dampening=0.2, weight_decay=0.05),
    "nesterov": lambda: SGD(0.03, momentum=0.9, weight_decay=0.0, nesterov=True),
    "adagrad": lambda: Adagrad(0.1, lr_decay=0.1, weight_decay=0.05, eps=1e-2),
    "rmsprop": lambda: RMSprop(0.05, alpha=0.8, eps=1e-2, weight_decay=0.05, momentum=0.5, centered=True),
    "rmsprop plain": lambda: RMSprop(0.05, alpha=0.8, eps=1e-2),
    "adadelta": lambda: Adadelta(2.0, rho=0.8, eps=1e-2, weight_decay=0.05),
    "adam": lambda: Adam(0.1, 0.7, 0.8, eps=1e-2, weight_decay=0.05),
    "amsgrad": lambda: Adam(0.1, 0.7, 0.8, eps=1e-2, amsgrad=True),
    "adamw": lambda: AdamW(0.1, 0.7, 0.8, eps=1e-2, weight_decay=0.05),
    "scheduled": lambda: Scheduled(Adam(0.1, eps=1e-2), [1.0, 0.5, 0.7], every=2),
    "by layer": lambda: Scheduled(ByLayer(RMSprop(0.02, eps=1e-2), NAMES, phases=2, steps=STEPS), [1.0, 0.5], every=3),
}


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def inner_loss(params, carry, batch, step):
    """Not convex. The gradient of ``idle`` is always zero, that of ``late`` in the first half."""
    w, late = params["w"], params["late"]
    first = (w.sin() * torch.arange(1.0, 4) * batch).sum() + 0 * params["idle"].sum()
    return first + (step >= STEPS // 2) * (w.sum() * late - 1.7).pow(2).sum(), carry


def outer(rule, hyper, **how):
    """The outer loss after a few steps with ``hyper`` for the rule's hyperparameters; ``idle`` starts at zero too."""

    def update(*arguments):
        return functional_call(rule, hyper, arguments)

    update.init = rule.init
    start = {"w": torch.tensor([0.3, -0.4, 1.0]), "late": torch.tensor([0.0, 0.5]), "idle": torch.zeros(2)}
    batches = [torch.tensor(1 + 0.1 * t) for t in range(STEPS)]
    params = unroll(inner_loss, update if hyper else rule, start, batches, **how).params
    return (params["w"] - 0.5).pow(2).sum() + params["late"].exp().sum() + (params["idle"] + 0.1).pow(2).sum()


def slope(function, size=1e-5):
    """The derivative of a function of a number at 0: central differences of two sizes, extrapolated to size 0."""
    coarse, fine = ((function(h) - function(-h)) / (2 * h) for h in (size, size / 2))
    return (4 * fine - coarse) / 3


@pytest.mark.parametrize("name", RULES)
def test_every_hyperparameter_passes_finite_differences(name):
    rule = RULES[name]()
    hyper = {name: p.detach().clone() for name, p in rule.named_parameters()}
    leaves = {name: value.clone().requires_grad_() for name, value in hyper.items()}
    found = torch.autograd.grad(outer(rule, leaves), list(leaves.values()))
    for (name, value), grad in zip(hyper.items(), found):
        for i, entry in enumerate(grad.flatten()):
            unit = torch.eye(value.numel())[i].view_as(value)
            with torch.no_grad():
                expected = slope(lambda h: outer(rule, {**hyper, name: value + h * unit}))  # noqa: B023
            assert entry.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-8), f"{name}[{i}]"


@pytest.mark.parametrize("name", RULES)
def test_forward_mode_equals_reverse_mode(name):
    rule = RULES[name]()
    hyper = {name: p.detach().clone() for name, p in rule.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in hyper.items()}
    grads = torch.func.grad(lambda hyper: outer(rule, hyper))(hyper)
    expected = sum((grads[name] * tangents[name]).sum() for name in hyper)
    _, found = torch.func.jvp(lambda hyper: outer(rule, hyper), (hyper,), (tangents,))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["nesterov", "amsgrad", "by layer"])
@pytest.mark.parametrize("how", [{"remat": Every(4)}, {"remat": Sqrt()}, {"gradient": Mixed()}])
def test_rematerialised_and_mixed_loops_give_the_same(name, how):
    rule = RULES[name]()
    for p in rule.parameters():
        p.requires_grad_()

    def grads(**how):
        return torch.autograd.grad(outer(rule, {}, **how), list(rule.parameters()))

    for found, expected in zip(grads(**how), grads(gradient=Reverse())):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_tasks_under_vmap_equal_a_loop():
    rule = RULES["amsgrad"]()
    rates = torch.tensor([0.05, 0.1, 0.2])
    slopes = torch.func.vmap(torch.func.grad(lambda lr: outer(rule, {"lr": lr})))(rates)
    for lr, slope in zip(rates, slopes):
        torch.testing.assert_close(slope, torch.func.grad(lambda lr: outer(rule, {"lr": lr}))(lr))
