"""Learning rates by layer and phase: the gradient, what goes back to torch.optim, resuming, bad input."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from metahpo.errors import CheckpointError, ConfigError, DataError, NetError, NonFiniteError
from metahpo.functional import FunctionalModule
from metahpo.inner import InnerProblem
from metahpo.tuning import Rates, load_digits, tune_rates
from metahpo.tuning.data import Loader
from metahpo.tuning.rates import RatesSettings, RatesTuner


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()


@pytest.fixture(scope="module")
def digits():
    data = load_digits((100, 60, 100))
    return {name: part._replace(x=part.x.double()) for name, part in data.items()}


def a_tuner(digits, net=None, **settings) -> RatesTuner:
    chosen = {"steps": 5, "phases": 2, "batch": 20, "iterations": 4, "lr": 0.3, "momentum": 0.5, **settings}
    train, val = Loader(digits["train"], chosen["batch"]), Loader(digits["val"], 60)
    return RatesTuner(net or small_net(), F.cross_entropy, train, val, RatesSettings.of(**chosen))


@pytest.mark.parametrize(
    ("rule", "tune"),
    [
        ("sgd", ["lr", "momentum", "weight_decay"]),
        ("adam", ["lr", "beta1"]),
        ("adamw", ["lr", "beta2", "weight_decay"]),
    ],
)
def test_an_outer_step_follows_the_gradient_of_the_validation_loss(digits, rule, tune):
    def val_loss(name=None, index=None, change=0.0):
        tuner = a_tuner(digits, rule=rule, tune=tune, weight_decay=0.01, lr=0.3 if rule == "sgd" else 0.02)
        for raw in tuner.raw.values():
            # Apart, so that a row or a phase in another's place would show.
            raw.data = raw.data.double() + torch.linspace(-0.4, 0.4, raw.numel(), dtype=torch.float64).view_as(raw)
        if name:
            tuner.raw[name].data[index] += change
        return tuner.step()["val_loss"], tuner

    _, tuner = val_loss()
    for name, raw in tuner.raw.items():
        slopes = torch.zeros_like(raw)
        for index in itertools.product(range(2), range(2)):
            up, down = (val_loss(name, index, sign * 1e-4)[0] for sign in (1, -1))
            slopes[index] = (up - down) / 2e-4
        # The step takes its direction alone.
        torch.testing.assert_close(raw.grad, slopes / slopes.norm(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("by", ["all", "layer", "tensor"])
def test_torch_optim_takes_the_same_steps(digits, rule, by):
    net, steps = small_net(), 7
    tune = ["lr", "momentum"] if rule == "sgd" else ["lr", "beta1", "beta2"]
    tuner = a_tuner(digits, net, rule=rule, by=by, tune=tune, steps=steps, phases=3, weight_decay=0.1)
    for raw in tuner.raw.values():
        raw.data += torch.linspace(-0.5, 0.5, raw.numel()).view_as(raw)
    tuner.rule.double()
    rates = tuner.result()
    generator = torch.Generator().manual_seed(1)
    batches = [digits["train"].select(torch.randperm(100, generator=generator)[:20]) for _ in range(steps)]

    module = FunctionalModule(net)
    problem = InnerProblem(lambda p, h, batch: F.cross_entropy(module(p, batch.x), batch.y))
    hparams = {f"rule.{name}": value.detach()[tuner._row].double() for name, value in tuner.values().items()}
    ours = problem.fit(tuner.rule, dict(module.params()), hparams, batches).params

    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[rule](
        rates.param_groups(net), lr=123.0
    )
    scheduler = rates.scheduler(optimizer)
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(net(batch.x), batch.y).backward()
        optimizer.step()
        scheduler.step()
    # The rates are float32, which torch.optim takes as Python numbers.
    for name, p in net.named_parameters():
        torch.testing.assert_close(ours[name], p, rtol=1e-12, atol=1e-13)


def test_goes_on_from_its_state_bit_for_bit(digits):
    whole = a_tuner(digits)
    whole.run()
    first = a_tuner(digits)
    first.run(2)
    second = a_tuner(digits)
    second.load_state_dict(first.state_dict())
    second.iteration, second.history = first.iteration, list(first.history)
    second.run()
    assert second.history == whole.history
    for name, raw in whole.raw.items():
        assert torch.equal(raw, second.raw[name])


def test_a_net_of_the_users_own_trains_better_with_its_rates(digits):
    net = small_net().float()
    before = {name: p.clone() for name, p in net.named_parameters()}
    train, val, test = (TensorDataset(part.x.float(), part.y) for part in digits.values())
    rows = []
    rates = tune_rates(
        net,
        F.cross_entropy,
        DataLoader(train, 20, shuffle=True),
        DataLoader(val, 60),
        steps=8,
        phases=2,
        lr=0.05,
        iterations=8,
        outer_lr=0.4,
        on_step=rows.append,
    )
    assert isinstance(rates, Rates)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.1
    assert set(rates.groups) == {"1", "3"}
    assert rates.values["lr"].shape == (2, 2)
    assert "| `1` |" in rates.table()
    assert set(rates.pictures()) == {"rates"}
    torch.testing.assert_close(dict(net.named_parameters()), before, rtol=0, atol=0)
    again = Rates.of(rates.tensors())
    assert again.table() == rates.table()
    assert again.spans() == ["steps 1-4", "steps 5-8"]
    x, y = test.tensors
    figures = a_tuner({k: p._replace(x=p.x.float()) for k, p in digits.items()}, net, steps=8).compare(x, y)
    assert set(figures) == {"tuned", "initial rates"}


def test_rates_that_diverge_are_halved_and_told(digits):
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return (self.w.pow(4).sum() * x).sum(dim=(1, 2, 3))

    data = [(torch.ones(2, 1, 8, 8), torch.ones(2))] * 2

    def tuner(lr):
        chosen = RatesSettings.of(steps=12, phases=1, lr=lr, momentum=0.1, weight_decay=0, tune=["lr"], fresh=False)
        return RatesTuner(Growing(), lambda output, y: output.mean() * 1e-3, data, data, chosen)

    found = tuner(20.0)
    found.step()
    assert found.warnings
    assert "the inner training diverged" in next(iter(found.warnings))
    assert "all rates were halved" in next(iter(found.warnings))
    with pytest.raises(NonFiniteError, match="the inner training diverged"):
        tuner(1e4).step()
    found = tuner(1.0)
    found.step()
    before = found.raw["lr"].detach().clone()
    with torch.no_grad():
        found.raw["lr"] += 20
    found.iteration += 1
    found.step()
    assert "the last outer step was taken back" in next(iter(found.warnings))
    assert float((found.raw["lr"] - before).abs().max()) < 0.3


def test_bad_input_is_one_line(digits):
    net = small_net()
    loaders = [Loader(digits["train"], 20), Loader(digits["val"], 60)]

    def fails(kind, match, net=net, loaders=loaders, loss=F.cross_entropy, **settings):
        with pytest.raises(kind, match=match) as caught:
            tune_rates(net, loss, *loaders, **{"steps": 2, "phases": 1, "iterations": 1, **settings})
        assert "\n" not in str(caught.value)

    fails(ConfigError, "no setting 'step'; did you mean 'steps'", step=3)
    fails(ConfigError, "tune.*no hyperparameter 'lrr'; did you mean 'lr'", tune=["lrr"])
    fails(ConfigError, "tune: found 'beta1', but sgd has lr, momentum, weight_decay", tune=["beta1"])
    fails(ConfigError, "tune: found 'weight_decay', but it begins at 0", tune=["weight_decay"], weight_decay=0)
    fails(DataError, "train_loader: found no batch", loaders=[[], loaders[1]])
    fails(DataError, "a loader gave list, expected pairs", loaders=[[[1]], loaders[1]])
    fails(NetError, "Flatten has no trainable parameter", net=nn.Flatten())
    fails(ConfigError, "phases: found 3, expected at most the 2 of steps", phases=3)
    fails(ConfigError, "batch: found 5, but the size of a batch is train_loader", batch=5)
    fails(NetError, r"train_loader: Linear or the loss fails on inputs \[20, 1, 8, 8\]", net=nn.Linear(3, 2))
    fails(NetError, r"the loss gave \[\d+\], expected a scalar", loss=nn.CrossEntropyLoss(reduction="none"))
    rates = a_tuner(digits).result()
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 10))
    with pytest.raises(NetError, match=r"the tuned net has no trainable parameter '4\.weight'"):
        rates.param_groups(other)
    with pytest.raises(NetError, match=r"groups are \[None\], expected \[.*\], those of param_groups"):
        rates.scheduler(torch.optim.SGD(net.parameters(), 0.1))


def test_rates_stay_above_zero_and_momenta_below_one(digits):
    tuner = a_tuner(digits, tune=["lr", "momentum"], outer_lr=50.0, iterations=2)
    with torch.no_grad():
        tuner.raw["momentum"] += 40
        tuner.raw["lr"] -= 60
    values = tuner.result().values
    assert float(values["lr"].min()) > 0
    assert float(values["momentum"].max()) < 1
    assert math.isclose(float(a_tuner(digits, lr=0.123).result().values["lr"][0, 0]), 0.123, rel_tol=1e-6)


def test_adamw_without_decay_hands_on_none(digits):
    rates = a_tuner(digits, rule="adamw", tune=None, weight_decay=0).result()
    assert {group["weight_decay"] for group in rates.optimizer(small_net()).param_groups} == {0.0}
    assert set(rates.values) == {"lr", "beta1", "beta2", "eps"}


def test_a_schedule_is_kept_as_plain_values(digits, tmp_path):
    rates, net = a_tuner(digits).result(), small_net()
    scheduler = rates.scheduler(rates.optimizer(net))
    torch.save(scheduler.state_dict(), tmp_path / "schedule.pt")
    state = torch.load(tmp_path / "schedule.pt", weights_only=True)
    again = rates.scheduler(rates.optimizer(net))
    again.load_state_dict(state)
    assert again.last_epoch == scheduler.last_epoch


@pytest.mark.parametrize("inner_gradient", ["reverse", "mixed"])
def test_a_forward_of_any_batch_gives_what_a_loss_of_pairs_gives(digits, inner_gradient):
    options = {"steps": 3, "phases": 1, "iterations": 2, "inner_gradient": inner_gradient}
    train, val = [tuple(digits["train"])], [tuple(digits["val"])]
    expected = tune_rates(small_net(), F.cross_entropy, train, val, **options)

    def forward(net, batch):
        assert batch["what"] == "digits"
        return F.cross_entropy(net(batch["image"]), batch["label"])

    named = [[{"image": x, "label": y, "what": "digits"}] for ((x, y),) in (train, val)]
    found = tune_rates(small_net(), None, *named, forward=forward, **options)
    assert found.groups == expected.groups
    assert found.history == expected.history
    torch.testing.assert_close(found.values, expected.values, rtol=1e-10, atol=1e-12)
    with pytest.raises(DataError, match=r"gave dict, expected pairs .*forward\(net, batch\)"):
        tune_rates(small_net(), F.cross_entropy, *named, **options)
    with pytest.raises(ConfigError, match="found neither of loss and forward, expected one"):
        tune_rates(small_net(), None, train, val, **options)


@pytest.mark.parametrize("order", [1, -1])
def test_a_schedule_goes_on_at_its_own_step_and_finds_its_groups_by_name(order):
    values = {"lr": torch.tensor([[0.01, 0.02, 0.03], [0.04, 0.05, 0.06]]), "momentum": torch.full((2, 3), 0.9)}
    rates = Rates("sgd", {"first": ["0.weight", "0.bias"], "last": ["1.weight", "1.bias"]}, 6, values)

    def begun():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        return net, torch.optim.SGD(rates.param_groups(net)[::order], 0.1)

    def steps(net, optimizer, scheduler, count):
        for _ in range(count):
            net(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

    net, optimizer = begun()
    scheduler = rates.scheduler(optimizer)
    steps(net, optimizer, scheduler, 4)
    state = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict(), net.state_dict()))
    again, other = begun()
    again.load_state_dict(state[2])
    other.load_state_dict(state[0])
    schedule = rates.scheduler(other)
    schedule.load_state_dict(state[1])
    assert [group["lr"] for group in other.param_groups] == pytest.approx([0.03, 0.06][::order])
    steps(net, optimizer, scheduler, 1)
    steps(again, other, schedule, 1)
    for found, wanted in zip(again.parameters(), net.parameters()):
        assert torch.equal(found, wanted)


def test_a_state_of_layers_in_another_order_is_refused(digits):
    state = a_tuner(digits).state_dict()
    state["groups"] = dict(reversed(state["groups"].items()))
    with pytest.raises(CheckpointError, match=r"its rows are \['3', '1'\], expected \['1', '3'\]"):
        a_tuner(digits).load_state_dict(state)
