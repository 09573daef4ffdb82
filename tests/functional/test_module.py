from __future__ import annotations

import cProfile

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from metahpo.errors import NetError
from metahpo.functional import FunctionalModule


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, on: bool = True):
        super().__init__()
        self.inner, self.reentrant, self.on = nn.Linear(3, 3), reentrant, on

    def forward(self, x):
        if not self.on:
            return self.inner(x)
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=self.reentrant)


def test_runs_with_the_parameters_given_and_leaves_the_net_alone():
    net = nn.Linear(3, 2)
    module = FunctionalModule(net)
    x = torch.randn(4, 3)
    params = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    torch.testing.assert_close(module(params, x), x @ params["weight"].T + params["bias"])
    torch.testing.assert_close(module({}, x), net(x))
    torch.testing.assert_close(module({"bias": params["bias"]}, x), net(x) - net.bias + params["bias"])
    assert module.params()["weight"] is not net.weight, "the net is copied"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside_grad", [True, False])
def test_refuses_checkpointed_blocks(reentrant, inside_grad):
    module = FunctionalModule(Checkpointed(reentrant))
    x = torch.randn(4, 3, requires_grad=True)

    def loss(params):
        return module(params, x).sum()

    with pytest.raises(NetError, match="Checkpointed checkpoints activations inside"):
        torch.func.grad(loss)(module.params()) if inside_grad else loss(module.params())


def test_takes_a_net_whose_checkpointing_is_switched_off():
    module = FunctionalModule(Checkpointed(False, on=False))
    assert module(module.params(), torch.randn(4, 3)).shape == (4, 3)


def test_under_a_profiler_it_runs_and_looks_for_checkpointing_at_a_later_call():
    x = torch.randn(4, 3)
    module = FunctionalModule(Checkpointed(False))
    assert cProfile.Profile().runcall(module, module.params(), x).shape == (4, 3)
    with pytest.raises(NetError, match="checkpoints activations"):
        module(module.params(), x)


@pytest.mark.parametrize(
    "net",
    [nn.InstanceNorm1d(3, track_running_stats=True), nn.utils.spectral_norm(nn.Linear(4, 4))],
    ids=["norm", "spectral"],
)
def test_buffers_that_a_net_writes_in_place_are_handed_out_instead(net):
    module = FunctionalModule(net)
    before = {name: b.clone() for name, b in module.buffers_by_name().items()}
    _, after = module.apply_with(module.params(), module.buffers_by_name(), torch.randn(5, 3, 4))
    assert all(torch.equal(b, before[name]) for name, b in module.buffers_by_name().items())
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_refuses_lazy_modules():
    with pytest.raises(NetError, match=r"LazyLinear\.weight is lazy"):
        FunctionalModule(nn.LazyLinear(3))


def test_refuses_unknown_names():
    with pytest.raises(NetError, match=r"Linear has no parameter 'wieght'; it has weight, bias"):
        FunctionalModule(nn.Linear(3, 2))({"wieght": torch.zeros(2, 3)}, torch.zeros(1, 3))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(torch.tanh(self.encode(x)))


def test_tied_parameters_are_one_and_stay_tied():
    module = FunctionalModule(Tied())
    assert list(module.params()) == ["encode.weight"]
    new, x = torch.randn(3, 3), torch.randn(2, 3)
    expected = torch.tanh(x @ new.T) @ new.T
    torch.testing.assert_close(module({"encode.weight": new}, x), expected)
    torch.testing.assert_close(module({"decode.weight": new}, x), expected)
    with pytest.raises(NetError, match="one tied parameter"):
        module({"encode.weight": new, "decode.weight": new.clone()}, x)


def test_frozen_parameters_are_not_given_out():
    net = nn.Linear(3, 2)
    net.bias.requires_grad_(False)
    assert list(FunctionalModule(net).params()) == ["weight"]
