from __future__ import annotations

import cloudpickle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metahpo.errors import NetError, NonFiniteError, SearchError
from metahpo.hypergrad import Forward
from metahpo.inner import SGD, Adam, LayerStepRates
from metahpo.nets import MLP
from metahpo.searchers import Float, Gradient, HypergradientObjective, Random, Space, Study
from metahpo.tuning import Labelled, load_digits
from metahpo.tuning.data import minibatches

SETTINGS = {"lr": 0.2, "momentum": 0.8, "weight_decay": 0.01}


def made(rule=None, *, net=None, double=True, **options) -> HypergradientObjective:
    data = load_digits((60, 40, 50))
    train, val = (
        Labelled(data[part].x.double() if double else data[part].x, data[part].y) for part in ("train", "val")
    )
    torch.manual_seed(0)
    net = net or nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))
    net = net.double() if double else net
    rule = rule or SGD(0.1, momentum=0.9, weight_decay=1e-4)
    return HypergradientObjective(net, F.cross_entropy, train, val, rule, **{"steps": 12, "batch": 20, **options})


def penalised(outputs, targets, params, hparams):
    decay = hparams["log_decay"].exp() * sum(p.square().sum() for p in params.values())
    return F.cross_entropy(outputs, targets, label_smoothing=0.0) * hparams["scale"] + decay


CASES = {
    "whole net": ({}, SETTINGS),
    "forward mode": ({"strategy": Forward()}, SETTINGS),
    "schedule": ({"schedule": [1.0, 0.5, 0.1]}, SETTINGS),
    "by layer": ({}, {"lr.1": 0.3, "lr.3": 0.1, "weight_decay.3": 0.02, "momentum": 0.8}),
    "by layer, schedule": ({"schedule": [1.0, 0.3]}, {"lr": 0.3, "lr.3": 0.1, "lr.3.bias": 0.2}),
    "adam": ({"rule": Adam(0.01)}, {"lr": 0.03, "beta1": 0.8}),
    "loss": ({"train_loss": penalised}, {"log_decay": -5.0, "scale": 0.7, "lr": 0.2}),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_central_differences_of_the_score(name):
    options, settings = CASES[name]
    outcome = made(**options).outcome(settings)
    plain = made(**options, gradients=False)
    assert plain.outcome(settings).gradients == {}
    assert outcome.score == pytest.approx(plain.outcome(settings).score, rel=1e-12)
    assert list(outcome.gradients) and set(outcome.gradients) == set(settings)
    for key, value in settings.items():
        step = 1e-5 * abs(value)
        up, down = (plain.outcome({**settings, key: value + sign * step}).score for sign in (1, -1))
        assert outcome.gradients[key] == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-9), key


@pytest.mark.parametrize("gradients", [True, False])
def test_the_score_is_that_of_a_plain_training_by_torch_optim(gradients):
    objective = made(gradients=gradients, schedule=[1.0, 0.25])
    net = objective.module.net
    before = {name: p.clone() for name, p in net.named_parameters()}
    score = objective.outcome(SETTINGS).score
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    optimizer = torch.optim.SGD(net.parameters(), **SETTINGS)
    draws = minibatches(objective.train, 20, torch.Generator().manual_seed(0))
    for step, (x, y) in zip(range(12), draws):
        optimizer.param_groups[0]["lr"] = 0.2 * (1.0 if step < 6 else 0.25)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert score == pytest.approx(F.cross_entropy(net(objective.val.x), objective.val.y).item(), rel=1e-12)


def test_nets_with_batch_normalisation_score_the_same_with_and_without_gradients():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    one, other = (made(net=net, gradients=gradients).outcome(SETTINGS) for gradients in (True, False))
    assert one.score == pytest.approx(other.score, rel=1e-10)


@pytest.mark.parametrize("gradients", [True, False])
def test_nothing_is_carried_from_one_trial_to_the_next(gradients):
    layers = nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 10)
    objective = made(net=nn.Sequential(*layers), gradients=gradients)
    first = objective.outcome(SETTINGS)
    objective.outcome({"lr": 0.5})
    assert objective.outcome(SETTINGS) == first


def test_the_seed_draws_the_batches_and_the_net_that_was_trained_is_handed_out():
    scores = {seed: made(seed=seed).outcome(SETTINGS).score for seed in (0, 1)}
    assert scores[0] != scores[1]
    objective = made(seed=1)
    net = objective.fitted(SETTINGS)
    assert not net.training
    assert F.cross_entropy(net(objective.val.x), objective.val.y).item() == pytest.approx(scores[1], rel=1e-12)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_training_that_diverges_is_a_failed_trial_and_the_search_goes_on(gradients):
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 10))
    objective = made(SGD(0.1), net=linear, double=False, steps=20, gradients=gradients)
    with Study(Space(lr=Float(1e-3, 1e12, log=True)), Random(), seed=1) as study:
        best = study.optimize(objective, 8, max_failures=8)
        failed = [record for record in study.trials if record.state == "failed"]
    assert failed and all("diverged" in record.error and "\n" not in record.error for record in failed)
    assert best.settings["lr"] < 10


def test_a_finite_score_stands_where_its_gradient_is_not_finite():
    def no_gradient(*arguments):
        raise NonFiniteError("the hypergradient of 'rule.lr' is not finite though every loss of the 12 steps is")

    outcome = made(strategy=no_gradient).outcome(SETTINGS)
    assert outcome == made(gradients=False).outcome(SETTINGS)


def test_it_is_searched_by_gradient_and_can_be_sent_to_workers():
    space = Space(lr=Float(1e-3, 1, log=True), weight_decay=Float(1e-5, 0.1, log=True))
    objective = cloudpickle.loads(cloudpickle.dumps(made()))
    with Study(space, Gradient(), seed=0) as study, Study(space, Random(), seed=0) as control:
        best = study.optimize(objective, 12)
        assert best.score < control.optimize(made(gradients=False), 36).score
    assert any(record.notes["chain"] != record.number for record in study.trials)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentun": 0.5}, "setting 'momentun': SGD has no hyperparameter 'momentun'; did you mean 'momentum'?"),
        ({"lr.4": 0.5}, "setting 'lr.4': no tensor of Sequential is in '4'; known: 1.weight, 1.bias, 3.weight, 3.bias"),
        (
            {"lr.1.w": 0.5},
            "setting 'lr.1.w': no tensor of Sequential is in '1.w'; known: 1.weight, 1.bias, 3.weight, 3.bias",
        ),
        ({"lr": "fast"}, "setting 'lr': found 'fast', expected a number"),
    ],
)
def test_a_setting_that_nothing_has_is_named(settings, message):
    for gradients in (True, False):
        with pytest.raises(SearchError) as caught:
            made(gradients=gradients).outcome(settings)
        assert str(caught.value) == message


def test_what_cannot_be_trained_so_is_refused_at_once():
    with pytest.raises(NetError, match="Flatten has no trainable parameter"):
        made(net=nn.Flatten())
    with pytest.raises(NetError, match=r"scalar hyperparameters.*, found LayerStepRates"):
        made(LayerStepRates(["1.weight"], 12, 0.1))


def test_the_plain_training_has_no_graph():
    objective = made(gradients=False, net=MLP((1, 8, 8), 10, (8,)))
    assert all(p.grad_fn is None for p in objective.fitted(SETTINGS).parameters())
