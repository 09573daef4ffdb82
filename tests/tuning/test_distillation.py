"""Dataset distillation: its hypergradient, its state, its result, and what it refuses."""

from __future__ import annotations

import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metahpo.errors import ConfigError, DataError, MetaHPOError, NetError
from metahpo.nets import MLP
from metahpo.tuning import distillation_compare
from metahpo.tuning.data import Labelled
from metahpo.tuning.distillation import DistillationTuner, distill
from metahpo.tuning.distillation_settings import DistillationSettings
from metahpo.tuning.initial import reinitialised

SMALL = {"steps": 2, "iterations": 4, "batch": 9, "inits": 2, "full_steps": 40, "lr": 0.1, "rate": 0.5}


def some_data(count: int = 30) -> Labelled:
    """Three classes of images, each a bright row on noise."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 3
    x = 0.2 * torch.randn(count, 1, 3, 3, generator=generator, dtype=torch.float64)
    x[torch.arange(count), 0, y] += 1
    return Labelled(x, y)


def small_net() -> nn.Module:
    return reinitialised(MLP([1, 3, 3], 3, [8]).double(), 7)


def tuner(**settings) -> DistillationTuner:
    return DistillationTuner(some_data(), small_net(), DistillationSettings(**(SMALL | settings)))


def plain_training(net, params, images, labels, rates, batches):
    """The same training, written out."""
    for rate, which in zip(rates, batches):
        params = {name: p.detach().requires_grad_() for name, p in params.items()}
        loss = F.cross_entropy(torch.func.functional_call(net, params, (images[which],)), labels[which])
        grads = torch.autograd.grad(loss, list(params.values()))
        params = {name: (p - rate * g).detach() for (name, p), g in zip(params.items(), grads)}
    return params


def shared_batches():
    """Two epochs of two steps; of two images a class each step sees one."""
    return [torch.arange(3), torch.arange(3, 6)] * 2


@pytest.mark.parametrize("init", ["fixed", "random"])
def test_the_first_hypergradient_equals_finite_differences(init):
    data = some_data()
    found = tuner(init=init, share=True, epochs=2, images_per_class=2, batch=30)
    net, labels = found.net, torch.tensor([0, 1, 2, 0, 1, 2])
    starts = [net] if init == "fixed" else [reinitialised(net, 0, 0, i) for i in range(2)]

    def value(images, log_rates):
        total = 0.0
        for start in starts:
            params = dict(start.named_parameters())
            params = plain_training(net, params, images, labels, log_rates.exp(), shared_batches())
            total += float(F.cross_entropy(torch.func.functional_call(net, params, (data.x,)), data.y))
        return total / len(starts)

    gradient = found.hypergradient()
    given = [found.hparams["images"], found.hparams["rule.log_rates"]]
    assert float(gradient.value) == pytest.approx(value(*given), rel=1e-12)
    for at, name in enumerate(["images", "rule.log_rates"]):
        for i in range(0, given[at].numel(), 5 if at == 0 else 1):
            ends = []
            for sign in (1, -1):
                moved = [h.clone() for h in given]
                moved[at].view(-1)[i] += sign * 1e-5
                ends.append(value(*moved))
            assert float(gradient.grads[name].flatten()[i]) == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-8)


@pytest.mark.parametrize("init", ["fixed", "random"])
def test_a_resumed_distillation_is_the_uninterrupted_one(init):
    whole, first, second = tuner(init=init), tuner(init=init), tuner(init=init)
    whole.run()
    first.run(until=2)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    first.run()  # What was saved must not change with it.
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.iteration == 2
    second.run()
    assert second.history == whole.history
    for name, h in whole.hparams.items():
        assert torch.equal(second.hparams[name], h)


def test_the_seed_decides_the_images():
    first, again, other = (tuner(seed=seed, init="random").run() for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.rates, again.rates)
    assert not torch.equal(first.images, other.images)


def test_train_is_plain_gradient_descent_and_changes_nothing():
    net = small_net()
    before = {name: p.clone() for name, p in net.named_parameters()}
    found = distill(some_data(), 2, net, **(SMALL | {"share": True, "epochs": 2}))
    trained = found.train()
    expected = plain_training(
        net, dict(net.named_parameters()), found.images, found.labels, found.rates, shared_batches()
    )
    for name, p in trained.named_parameters():
        assert torch.allclose(p, expected[name], rtol=0, atol=1e-12)
        assert torch.equal(net.get_parameter(name), before[name])
    assert type(trained) is MLP
    other = found.train(reinitialised(net, 8))
    assert not torch.allclose(other.get_parameter("layers.1.weight"), trained.get_parameter("layers.1.weight"))


def test_batch_norm_keeps_its_running_statistics():
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)).double()
    net(torch.randn(20, 1, 3, 3, dtype=torch.float64))
    found = distill(some_data(), 1, net, **SMALL)
    trained = found.train()
    assert not trained.training and torch.equal(trained[1].running_mean, net[1].running_mean)
    assert trained[1].weight.shape == (2,) and not torch.equal(trained[1].weight, net[1].weight)


@pytest.mark.parametrize("init", ["fixed", "random"])
def test_a_distillation_from_first_step_to_comparison(init, monkeypatch):
    monkeypatch.setattr(distillation_compare, "CONTROL_STEPS", 8)
    monkeypatch.setattr(distillation_compare, "STARTS", 2)
    data = some_data(60)
    settings = DistillationSettings(
        **(SMALL | {"iterations": 40, "init": init, "full_steps": 150, "rate_lr": 0.05, "steps": 3})
    )
    found = DistillationTuner(data.select(torch.arange(30)), small_net(), settings, data.select(torch.arange(30, 60)))
    result = found.run()
    assert found.history[-1]["val_loss"] < 0.6 * found.history[0]["val_loss"]
    assert 0 <= found.history[-1]["val_accuracy"] <= 1
    rows = found.compare(*data.select(torch.arange(30, 60)))
    assert list(rows) == ["distilled images", "random real images", "whole training set"]
    # The digits of scripts/prove_distillation.py tell them apart; here real images are about as good.
    assert rows["distilled images"]["loss"] < 0.65 * math.log(3)
    assert rows["whole training set"]["accuracy"] > 0.9
    runs = [row["runs"] for row in rows.values()]
    assert runs == ([1, 5, 1] if init == "fixed" else [2, 10, 2])
    assert result.table().count("\n") == 2 + 1 + settings.steps
    assert set(result.pictures()) == {"images", "loss"}
    assert len(result.dataset()) == 3 and result.dataset()[2][1] == 2
    file = io.BytesIO()
    torch.save(result.tensors(), file)
    file.seek(0)
    assert ("net" in torch.load(file, weights_only=True)) == (init == "fixed")


def test_the_default_net_fits_the_data():
    found = distill(some_data(), steps=1, iterations=1)
    assert found.train()(some_data().x).shape == (30, 3)


class Frozen(nn.Module):
    """A net whose scale no ``reset_parameters`` sets."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(9, 3, dtype=torch.float64))

    def forward(self, x):
        return x.flatten(1) @ self.scale


X, Y = some_data()


@pytest.mark.parametrize(
    ("data", "net", "settings", "kind", "said"),
    [
        ((X, Y), None, {"images_per_class": 0}, ConfigError, "images_per_class: should be greater than or equal to 1"),
        ((X, Y), None, {"image_lr": 0.1}, ConfigError, "no setting 'image_lr'; did you mean 'rate_lr'"),
        ((X, Y), None, {"share": True, "steps": 2}, ConfigError, "found 1, expected a multiple of steps"),
        (
            (X[Y != 1], Y[Y != 1]),
            None,
            {},
            DataError,
            "class 1 has no images; expected some of every class from 0 to 2",
        ),
        ((X.flatten(1), Y), None, {}, DataError, r"found examples \[9\], expected images"),
        ((X, X.flatten(1)), None, {}, DataError, "found targets of torch.float64, expected labels"),
        ((X, Y), MLP([1, 3, 3], 2).double(), {}, NetError, r"gave \[2, 2\] for images .* expected logits \[2, 3\]"),
        ((X, Y), MLP([5], 3).double(), {}, NetError, r"cannot take images \[2, 1, 3, 3\]"),
        ((X, Y), Frozen(), {"init": "random"}, NetError, "scale: cannot be drawn anew"),
        ((X, Y), nn.Flatten(), {}, NetError, "no trainable parameters"),
    ],
)
def test_bad_input_gives_one_line(data, net, settings, kind, said):
    with pytest.raises(kind, match=said) as error:
        distill(data, net=net, **settings)
    assert isinstance(error.value, MetaHPOError)
    assert "\n" not in str(error.value)
