"""Weight decay by gradient: its gradient, its twin in torch.optim, its state, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metahpo.errors import ConfigError, DataError, NetError, NonFiniteError
from metahpo.tuning import base, tune_decay
from metahpo.tuning.decay import DECAY, DecayTuner
from metahpo.tuning.decay_result import Decay
from metahpo.tuning.settings import DecaySettings

BY = ["all", "layer", "parameter"]


def small_data(count: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, (x[:, 0] + x[:, 1] > 0).long()


def small_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def tuner(net=None, *, train=None, val=None, **settings) -> DecayTuner:
    settings = {"steps": 12, "every": 3, "batch": 6, "val_batch": 8, **settings}
    given = train or small_data(20, 0), val or small_data(16, 1)
    return DecayTuner(net or small_net(), F.cross_entropy, *given, DecaySettings(**settings))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # Of torch.func.hessian.
@pytest.mark.parametrize("by", BY)
def test_moves_the_decays_by_the_dense_implicit_gradient(by):
    """With the whole sets as batches and a long series: v = H^-1 g with H formed by torch.func.hessian."""
    net, train, val = small_net(), small_data(20, 0), small_data(16, 1)
    options = {"steps": 100, "every": 100, "batch": 20, "val_batch": 16, "lr": 0.05, "decay": 0.3, "max_decay": 1.0}
    one = tuner(net, train=train, val=val, by=by, terms=300, scale=0.5, **options)
    one._train(100)
    shapes = {name: p.shape for name, p in one.params.items()}

    def unflat(w):
        parts = w.split([s.numel() for s in shapes.values()])
        return {name: part.view(s) for part, (name, s) in zip(parts, shapes.items())}

    def loss(w, data):
        return F.cross_entropy(torch.func.functional_call(net, unflat(w), (data[0],)), data[1])

    w = torch.cat([p.detach().flatten() for p in one.params.values()])
    hessian = torch.func.hessian(lambda w: loss(w, train) + 0.15 * w.square().sum())(w)
    v = torch.linalg.solve(hessian, torch.func.grad(loss)(w, val))
    expected = unflat(-0.3 * w * v)
    one._update_decays()
    sums = {name: e if by == "parameter" else e.sum() for name, e in expected.items()}
    sums = {"all": sum(sums.values())} if by == "all" else sums
    for name, e in sums.items():
        torch.testing.assert_close(one.logs[DECAY + name].grad, e, rtol=1e-4, atol=1e-7)
    assert not one.result().warnings


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_trains_as_torch_optim_with_that_weight_decay(optimizer):
    net, train = small_net(), small_data(20, 0)
    one = tuner(net, train=train, by="layer", batch=20, steps=10, every=10, lr=0.05, optimizer=optimizer, decay=0.1)
    one._train(10)
    twin = copy.deepcopy(net)
    kind = {"adam": torch.optim.Adam, "sgd": lambda p, **k: torch.optim.SGD(p, momentum=0.9, **k)}[optimizer]
    plain = kind(one.result().param_groups(twin), lr=0.05)
    assert [group["weight_decay"] for group in plain.param_groups] == pytest.approx([0.1] * 4)
    for _ in range(10):
        plain.zero_grad()
        F.cross_entropy(twin(train[0]), train[1]).backward()
        plain.step()
    torch.testing.assert_close(dict(one.params), dict(twin.named_parameters()), rtol=1e-10, atol=1e-12)
    assert not torch.equal(twin[0].weight, net[0].weight)


@pytest.mark.parametrize("by", BY)
def test_goes_on_from_its_state_bit_for_bit(by):
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 2)).double()
    whole, first, second = (tuner(net, by=by) for _ in range(3))
    whole.run()
    first.run(2)
    torch.rand(5)
    second.load_state_dict(first.state_dict())
    second.run()
    assert second.history == whole.history
    for name, value in whole.result().net.state_dict().items():
        assert torch.equal(second.result().net.state_dict()[name], value), name
    for name, value in whole.logs.items():
        assert torch.equal(second.logs[name], value)
        assert not torch.equal(value, torch.full_like(value, 1e-4).log())


def test_the_result_carries_the_tuned_net_and_its_decays():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).double()
    before = copy.deepcopy(net.state_dict())
    given = small_data(20, 0), small_data(16, 1)
    found = tune_decay(net, F.cross_entropy, *given, by="layer", steps=30, every=3, lr=0.05)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    x = given[1][0]
    other = copy.deepcopy(net).eval()
    found.load_into(other)
    torch.testing.assert_close(other(x), found.net(x))
    other.load_state_dict = lambda *_, **__: None  # As nets that keep their pretrained weights.
    torch.nn.init.zeros_(other[0].weight)
    found.load_into(other)
    torch.testing.assert_close(other(x), found.net(x))
    with pytest.raises(NetError, match=r"load_into: '\d\.\w+' is in the tuned net alone"):
        found.load_into(other[:1])
    assert (
        base.test(other, F.cross_entropy, *given[0])["loss"] < 0.5 * base.test(net, F.cross_entropy, *given[0])["loss"]
    )
    # Running statistics came along: they are those of the tuned net's activations.
    mean = other[0](given[0][0]).mean(0)
    assert (other[1].running_mean - mean).norm() < 0.5 * (mean - before["1.running_mean"]).norm()
    groups = found.param_groups(other)
    assert [g["weight_decay"] for g in groups] == [float(d) for d in found.decays.values()]
    assert len(found.table().splitlines()) == 2 + 6
    assert set(found.pictures()) == {"decays", "curves"}
    assert found.tensors()["log_decays"].keys() == dict(net.named_parameters()).keys()
    assert len(found.warnings) == 1 and "relative residual" in found.warnings[0]
    with pytest.raises(NetError, match=r"only .* has a trainable parameter"):
        found.param_groups(nn.Linear(4, 2))


@pytest.mark.parametrize("by", ["layer", "parameter"])
def test_decays_lower_the_validation_loss_and_stay_below_their_bound(by):
    options = {"steps": 150, "lr": 0.05, "batch": 10, "val_batch": 16, "max_decay": 0.05, "decay_lr": 1.0}
    torch.manual_seed(0)
    val = small_data(16, 1)
    one = tuner(train=small_data(10, 0), val=val, by=by, **options)
    found = one.run()
    assert max(float(d.max()) for d in found.decays.values()) == pytest.approx(0.05)
    rows = one.compare(*val)
    assert list(rows) == ["tuned", "retrained", "untuned"]
    assert rows["tuned"]["loss"] < 0.8 * rows["untuned"]["loss"]
    assert rows["tuned"]["loss"] == pytest.approx(base.test(found.net, F.cross_entropy, *val)["loss"])
    assert rows["retrained"]["loss"] != rows["tuned"]["loss"]


def test_refuses_bad_input_in_one_line():
    train, val = small_data(20, 0), small_data(16, 1)
    nan = train[0].clone()
    nan[7, 2] = float("nan")

    def fails(error, match, net=None, train=train, val=val, **settings):
        with pytest.raises(error, match=match) as caught:
            tune_decay(net or small_net(), F.cross_entropy, train, val, **{"steps": 4, **settings})
        assert "\n" not in str(caught.value)

    fails(ConfigError, "by: should be 'all', 'layer' or 'parameter', found 'layers'", by="layers")
    fails(ConfigError, "no setting 'step'; did you mean 'steps'", **{"step": 3})
    fails(
        DataError, "train: 1 of 20 examples hold NaN or infinite values, the first is number 7", train=(nan, train[1])
    )
    fails(DataError, "val: found label 3, but Sequential has 2 outputs", val=(val[0], val[1] + 2))
    fails(DataError, "val: found 0 examples", val=(val[0][:0], val[1][:0]))
    fails(NetError, r"val: Sequential cannot take examples \[3\]", val=(val[0][:, :3], val[1]))
    fails(NonFiniteError, "the training diverged: its mean loss is .* lower lr", lr=1e200, steps=20)
    with pytest.raises(NetError, match=r"loss gave a tensor \[20, 2\], expected a scalar"):
        tune_decay(small_net(), lambda out, y: out, train, val)
    with pytest.raises(NetError, match=r"torch\.optim has no decay by parameter"):
        tuner(by="parameter").result().param_groups(small_net())


@pytest.mark.parametrize(("decays", "scale"), [((1.1, 1.2, 1.14), "linear"), ((1e-4, 3e-4, 0.2), "log")])
def test_ticks_of_decays_are_plain_numbers_or_powers(decays, scale):
    rows = tuple(
        {"iteration": i, "train_loss": 1 + decay, "val_loss": 2.0, "decay": decay} for i, decay in enumerate(decays)
    )
    logs = {"all": torch.tensor(0.1)}
    figure = Decay("all", logs, nn.Linear(2, 2), rows).pictures()["curves"]
    figure.canvas.draw()
    axis = figure.axes[1].yaxis
    labels = [label.get_text() for label in axis.get_ticklabels(which="both")]
    assert figure.axes[1].get_yscale() == scale
    assert any(labels)
    assert not [label for label in labels if "times" in label]


@pytest.mark.parametrize("by", BY)
def test_a_forward_of_any_batch_gives_what_a_loss_of_pairs_gives(by):
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double(), torch.randn(12, 3), None
    x, y = x.double(), torch.arange(12) % 2
    options = {"by": by, "steps": 4, "every": 2, "batch": 5, "val_batch": 6}
    expected = tune_decay(net, F.cross_entropy, (x, y), (x, y), **options)
    data = {"image": x, "label": y}

    def forward(net, batch):
        return F.cross_entropy(net(batch["image"]), batch["label"])

    found = tune_decay(net, None, data, data, forward=forward, **options)
    torch.testing.assert_close(found.log_decays, expected.log_decays, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.net.state_dict(), expected.net.state_dict(), rtol=1e-10, atol=1e-12)
    with pytest.raises(ConfigError, match="found neither of loss and forward"):
        tune_decay(net, None, data, data, **options)


@pytest.mark.parametrize("by", ["layer", "parameter"])
def test_goes_on_by_name_where_the_layers_are_defined_in_another_order(by):
    class Net(nn.Module):
        def __init__(self, names):
            super().__init__()
            for name in names:
                self.add_module(name, nn.Linear(4, 4).double())

        def forward(self, x):
            return self.last(torch.tanh(self.first(x)))

    net, other = Net(["first", "last"]), Net(["last", "first"])
    other.load_state_dict(net.state_dict())
    whole, first, second = (tuner(each, by=by) for each in (net, net, other))
    whole.run()
    first.run(2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.run()
    for name, value in whole.logs.items():
        torch.testing.assert_close(second.logs[name], value, rtol=1e-9, atol=1e-9)
    found = second.result().net.state_dict()
    for name, value in whole.result().net.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
