"""A tensor that a step's loss does not use stays as it is, as in torch.optim, however the gradient is taken."""

from __future__ import annotations

import pytest
import torch
from torch.func import vmap

from metahpo.hypergrad import FiniteDifference, Forward, Unroll
from metahpo.inner import (
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    AdamW,
    ByLayer,
    Every,
    FirstOrder,
    InnerProblem,
    Mixed,
    NoRemat,
    Reverse,
    RMSprop,
    Scheduled,
    unroll,
)

optim = torch.optim
RULES = [
    (SGD, optim.SGD, {"lr": 0.1, "weight_decay": 0.3}),
    (SGD, optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.3}),
    (SGD, optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (Adagrad, optim.Adagrad, {"lr": 0.3, "lr_decay": 0.1, "weight_decay": 0.3}),
    (RMSprop, optim.RMSprop, {"lr": 0.02, "momentum": 0.7, "centered": True, "eps": 1e-3}),
    (Adadelta, optim.Adadelta, {"lr": 3.0, "weight_decay": 0.3}),
    (Adam, optim.Adam, {"lr": 0.05, "betas": (0.5, 0.8), "weight_decay": 0.3}),
    (Adam, optim.Adam, {"lr": 0.05, "betas": (0.5, 0.6), "amsgrad": True}),
    (AdamW, optim.AdamW, {"lr": 0.05, "weight_decay": 0.3}),
]
# The steps whose loss uses the tensor "some".
USED = {"never": (), "late": (3, 4, 5), "early": (0, 1), "now and then": (1, 4)}
STEPS = 6


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def loss(params, carry, used, step):
    value = (params["w"].sin() * torch.arange(1.0, 4)).sum()
    return (value + (params["some"] - 1.7).pow(2).sum() if used else value), carry


def start():
    return {"w": torch.tensor([0.2, -1.0, 0.7]), "some": torch.tensor([0.5, -0.4])}


def made(kind, settings):
    betas = dict(zip(("beta1", "beta2"), settings.get("betas", ())))
    return kind(**{name: value for name, value in settings.items() if name != "betas"}, **betas)


def by_torch(kind, settings, used):
    params = {name: p.requires_grad_() for name, p in start().items()}
    optimizer = kind(params.values(), **settings)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(params, None, step in used, step)[0].backward()
        optimizer.step()
    return params


def same(ours, theirs):
    for name, p in theirs.items():
        torch.testing.assert_close(ours[name], p.detach(), rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize(("ours", "theirs", "settings"), RULES)
def test_every_rule_leaves_it_as_torch_does(ours, theirs, settings, used):
    rule, batches = made(ours, settings), [step in USED[used] for step in range(STEPS)]
    expected = by_torch(theirs, settings, USED[used])
    same(unroll(loss, rule, start(), batches).params, expected)
    same(unroll(loss, ByLayer(rule, start()), start(), batches).params, expected)


MODES = {
    "reverse": (Reverse(), NoRemat()),
    "first order": (FirstOrder(), NoRemat()),
    "mixed": (Mixed(), NoRemat()),
    "mixed by func": (Mixed("func"), NoRemat()),
    "remat": (Reverse(), Every(2)),
    "mixed in remat": (Mixed(), Every(2)),
}


@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("mode", MODES)
def test_every_way_of_the_inner_gradient_leaves_it_and_so_does_torch_func(mode, used):
    settings = {"lr": 0.05, "weight_decay": 0.3}
    rule, batches = Scheduled(made(AdamW, settings), [1.0]), [step in USED[used] for step in range(STEPS)]
    gradient, remat = MODES[mode]

    def final(params):
        return unroll(loss, rule, params, batches, gradient=gradient, remat=remat).params

    linked = {name: p.requires_grad_() for name, p in start().items()}
    expected = by_torch(optim.AdamW, settings, USED[used])
    same({name: p.detach() for name, p in final(linked).items()}, expected)

    def total(params):
        end = final(params)
        return sum(p.square().sum() for p in end.values()), end

    stacked = {name: torch.stack([p, p]) for name, p in start().items()}
    slopes, ends = vmap(torch.func.grad(total, has_aux=True))(stacked)
    same({name: p[1] for name, p in ends.items()}, expected)
    wanted = torch.autograd.grad(total(linked)[0], list(linked.values()))
    same({name: g[0] for name, g in slopes.items()}, dict(zip(linked, wanted)))


@pytest.mark.parametrize("used", USED)
def test_hypergradients_of_rates_and_decays_are_a_central_differences(used):
    rule, batches = made(Adam, {"lr": 0.05, "weight_decay": 0.3}), [step in USED[used] for step in range(STEPS)]
    problem = InnerProblem(lambda params, hparams, used: loss(params, None, used, 0)[0])

    def outer(params, hparams):
        return (params["w"] ** 2).sum() + (params["some"] ** 3).sum()

    hparams = {"rule.lr": torch.tensor(0.05), "rule.weight_decay": torch.tensor(0.3)}

    def value(**changed):
        return outer(problem.fit(rule, start(), {**hparams, **changed}, batches).params, {}).item()

    for strategy in (Unroll(), Unroll(Mixed()), Unroll(remat=Every(2)), Forward(), Forward(1)):
        result = strategy(problem, rule, outer, start(), hparams, batches)
        for name, h in hparams.items():
            slope = (value(**{name: h + 1e-6}) - value(**{name: h - 1e-6})) / 2e-6
            assert float(result.grads[name]) == pytest.approx(slope, rel=1e-6, abs=1e-8)
    exact = Unroll(truncate=1)(problem, rule, outer, start(), hparams, batches)
    near = FiniteDifference()(problem, rule, outer, start(), hparams, batches)
    same(near.grads, exact.grads)
