"""New initial weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metahpo.errors import NetError
from metahpo.nets import MLP, Conv4, ResNet12
from metahpo.tuning import tune_rates
from metahpo.tuning.initial import InitialNets, reinitialised


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


class Gated(nn.Module):
    """Sets what its parts cannot, and the last word on what they can."""

    def __init__(self):
        super().__init__()
        self.linear, self.part = nn.Linear(2, 3), Scale()
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.zeros_(self.linear.bias)
        nn.init.ones_(self.part.scale)


def test_the_seed_alone_decides_and_the_net_stays():
    net = MLP([4], 3)
    before = {name: p.clone() for name, p in net.named_parameters()}
    state = torch.get_rng_state()
    first, again, other = reinitialised(net, 5, 0), reinitialised(first_drawn(net), 5, 0), reinitialised(net, 5, 1)
    assert torch.equal(state, torch.get_rng_state())
    for name, p in first.named_parameters():
        assert torch.equal(p, again.get_parameter(name))
        assert not torch.equal(p, other.get_parameter(name))
        assert not torch.equal(p, before[name])
        assert torch.equal(net.get_parameter(name), before[name])


def first_drawn(net):
    """Another start, on which the result must not depend."""
    return reinitialised(net, 99)


def test_draws_as_the_layer_itself_does():
    # PyTorch's Linear is uniform in +-1 / sqrt(inputs).
    weight = reinitialised(nn.Linear(400, 300), 0).weight
    assert float(weight.detach().abs().max()) == pytest.approx(1 / 20, rel=0.01)
    assert float(weight.detach().std()) == pytest.approx(1 / 20 / 3**0.5, rel=0.02)


def test_frozen_parameters_stay_and_running_statistics_start_anew():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    net[0].requires_grad_(False)
    net(torch.randn(8, 2))
    new = reinitialised(net, 0)
    assert torch.equal(new[0].weight, net[0].weight)
    assert not torch.equal(new[2].weight, net[2].weight)
    assert not bool(new[1].running_mean.any())


def test_a_net_with_its_own_initialisation_has_the_last_word():
    net = reinitialised(Gated(), 0)
    assert not bool(net.linear.bias.any())
    assert bool(net.linear.weight.any())
    assert torch.equal(net.part.scale, torch.ones(3))
    attention = reinitialised(nn.TransformerEncoderLayer(4, 2), 0).self_attn
    assert not bool(attention.out_proj.bias.any())


@pytest.mark.parametrize(
    ("net", "named"),
    [
        (
            nn.Sequential(nn.Linear(2, 3), Scale()),
            "Sequential.1.scale: cannot be drawn anew.* of Scale 1 or.*function that builds the net.*fresh=False",
        ),
        (Scale(), "Scale.scale: cannot be drawn anew.* of Scale itself"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), "parametrizations.weight.original"),
        (nn.LazyLinear(3), "weight is lazy; run the net once"),
    ],
)
def test_what_cannot_be_drawn_is_named(net, named):
    with pytest.raises(NetError, match=named) as error:
        reinitialised(net, 0)
    assert "\n" not in str(error.value)


class Rescaled(nn.Module):
    """Initialises in its constructor, as torchvision's residual nets do."""

    def __init__(self, init=lambda net: nn.init.kaiming_normal_(net.convolution.weight, mode="fan_out")):
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(3, 64, 3), nn.Linear(64, 4)
        with torch.no_grad():
            init(self)

    def forward(self, x):
        return self.linear(F.relu(self.convolution(x)).mean((2, 3)))


class Tied(nn.Module):
    """The head and the embedding draw with deviations of 0.07 and 1."""

    def __init__(self, of_head: bool = False, first: str = "head"):
        super().__init__()
        made = {"head": nn.Linear(64, 30, bias=False), "embedding": nn.Embedding(30, 64)}
        for name in sorted(made, key=lambda name: name != first):
            self.add_module(name, made[name])
        kept = self.head.weight if of_head else self.embedding.weight
        self.head.weight = self.embedding.weight = kept


class Drawn(nn.Module):
    """Is drawn by the module around it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(300))

    def reset_parameters(self, std):
        nn.init.normal_(self.weight, std=std)


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Drawn()

    def reset_parameters(self):
        self.part.reset_parameters(std=1.0)


@pytest.mark.parametrize("of_head", [False, True])
@pytest.mark.parametrize("first", ["head", "embedding"])
def test_tied_weights_are_drawn_by_the_layer_that_drew_them(of_head, first):
    torch.manual_seed(0)
    net = Tied(of_head, first)
    new = reinitialised(net, 0)
    assert new.head.weight is new.embedding.weight and not torch.equal(new.head.weight, net.head.weight)
    # Uniform in +-1 / sqrt(64), or normal; of 1920 draws within 6 standard errors.
    assert float(new.head.weight.detach().std()) == pytest.approx(0.125 / 3**0.5 if of_head else 1, rel=0.1)


def test_a_reset_that_needs_arguments_is_left_to_the_module_around_it():
    assert float(reinitialised(Around(), 0).part.weight.detach().std()) == pytest.approx(1, rel=0.25)
    with pytest.raises(NetError, match=r"0\.weight: cannot be drawn anew, .* sets it without arguments"):
        reinitialised(nn.Sequential(Drawn()), 0)


@pytest.mark.parametrize(
    ("net", "said"),
    [
        # sqrt(2 / (64 * 9)) against 1 / sqrt(3 * 27).
        (Rescaled, r"Rescaled\.convolution\.weight: has a deviation of 0\.0\d+, .* draws it with 0\.1"),
        (lambda: Rescaled(lambda net: net.linear.bias.zero_()), r"linear\.bias: has a deviation of 0, but"),
        (lambda: Rescaled(lambda net: net.linear.weight.normal_()), r"linear\.weight: has a deviation of"),
        (lambda: Rescaled(lambda net: net.linear.weight.add_(1)), r"linear\.weight: has a mean of"),
        (lambda: nn.Sequential(nn.Linear(2, 2), Constant(0.0)), r"1\.scale: has a mean of 0 "),
    ],
)
def test_layers_that_would_draw_otherwise_than_the_constructor_are_refused(net, said):
    torch.manual_seed(0)
    with pytest.raises(NetError, match=said) as error:
        reinitialised(net(), 0)
    assert "pass a function that builds the net" in str(error.value)
    assert "fresh=False" in str(error.value)
    assert "\n" not in str(error.value)


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), value))

    def reset_parameters(self):
        nn.init.ones_(self.scale)


@pytest.mark.parametrize(
    "build",
    [
        lambda: MLP([4], 3, [5]),
        lambda: Conv4((3, 8, 8), 5, filters=4),
        lambda: ResNet12((3, 8, 8), 5, widths=[4, 8]),
        lambda: nn.LSTM(3, 20),
        lambda: nn.Embedding(10, 30, padding_idx=2),
        lambda: nn.Bilinear(4, 5, 1),
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.GroupNorm(2, 4), nn.PReLU()),
    ],
)
def test_layers_that_draw_as_the_constructor_does_are_never_refused(build):
    for seed in range(8):
        torch.manual_seed(seed)
        reinitialised(build(), seed)


def test_a_function_builds_the_nets_under_the_seed():
    nets = InitialNets(Rescaled, 5)
    drawn = nets.checked(7)
    state = torch.get_rng_state()
    again = nets.draw(7)
    assert torch.equal(state, torch.get_rng_state())
    for name, p in drawn.named_parameters():
        assert torch.equal(p, again.get_parameter(name))
        assert not torch.equal(p, nets.net.get_parameter(name))
    weights = torch.stack([nets.draw(i).convolution.weight.detach() for i in range(20)])
    assert float(weights.std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (3, "net: found int, expected a torch.nn.Module or a function"),
        (lambda: 3, "the function gave int, expected a torch.nn.Module"),
        (lambda x: x, "fails without arguments"),
        ((lambda net: lambda: net)(nn.Linear(2, 2)), "gave the same weights twice"),
        (lambda sizes=[3, 2]: nn.Linear(2, sizes.pop()), r"different parts, only one has (bias|weight) \["),
    ],
)
def test_functions_that_do_not_build_such_nets_are_refused(source, said):
    with pytest.raises(NetError, match=said):
        InitialNets(source, 0).checked(1)


def test_rates_are_tuned_for_nets_as_a_function_builds_them():
    x, y = torch.randn(4, 3, 5, 5), torch.arange(4)
    data = [(x, y)]
    options = {"steps": 2, "phases": 1, "iterations": 1}
    rates = tune_rates(Rescaled, F.cross_entropy, data, data, **options)
    assert set(rates.groups) == {"convolution", "linear"}
    torch.manual_seed(0)
    with pytest.raises(NetError, match=r"Rescaled\.convolution\.weight: has a deviation"):
        tune_rates(Rescaled(), F.cross_entropy, data, data, **options)
    tune_rates(Rescaled(), F.cross_entropy, data, data, fresh=False, **options)


def test_a_residual_net_of_torchvision_is_refused_as_a_net_and_drawn_as_it_is_by_a_function():
    models = pytest.importorskip("torchvision.models")
    net = models.resnet18(num_classes=3)
    with pytest.raises(NetError, match=r"ResNet\.conv1\.weight: has a deviation of 0\.02"):
        reinitialised(net, 0)
    drawn = InitialNets(lambda: models.resnet18(num_classes=3)).checked(1)
    for name, p in drawn.named_parameters():
        if p.dim() == 4 and p.numel() > 10_000:
            own = float(net.get_parameter(name).detach().std())
            assert float(p.detach().std()) == pytest.approx(own, rel=0.05), name
