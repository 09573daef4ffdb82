"""New initial weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metahpo.errors import NetError
from metahpo.nets import MLP
from metahpo.tuning.initial import reinitialised


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


class Gated(nn.Module):
    """Sets what its parts cannot, and the last word on what they can."""

    def __init__(self):
        super().__init__()
        self.linear, self.part = nn.Linear(2, 3), Scale()

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
        (nn.Sequential(nn.Linear(2, 3), Scale()), "Sequential.1.scale: cannot be drawn anew.* of Scale 1 or"),
        (Scale(), "Scale.scale: cannot be drawn anew.* of Scale itself"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), "parametrizations.weight.original"),
        (nn.LazyLinear(3), "weight is lazy; run the net once"),
    ],
)
def test_what_cannot_be_drawn_is_named(net, named):
    with pytest.raises(NetError, match=named) as error:
        reinitialised(net, 0)
    assert "\n" not in str(error.value)
