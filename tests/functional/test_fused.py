"""Nets on the C kernels: what they take, and the numbers of the nets as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from metahpo.functional import FunctionalModule, fused
from metahpo.functional.batch_norm import PerStepBatchNorm
from metahpo.functional.fused import fuse
from metahpo.native import build
from metahpo.nets import Conv4, ResNet12

pytestmark = pytest.mark.skipif(build.library(torch.float64) is None, reason="no C kernels here")


@pytest.fixture
def calls(monkeypatch):
    """The names of the kernels called."""
    seen = []
    for name in ("conv2d", "norm_act_pool"):
        original = getattr(fused.native, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            seen.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(fused.native, name, counted)
    return seen


def pair(net: nn.Module, **options) -> tuple[FunctionalModule, FunctionalModule]:
    """The net in float64, fused and not."""
    plain = FunctionalModule(net, **options).double()
    twin = copy.deepcopy(plain)
    twin.fuse()
    return twin, plain


def images(*shape) -> torch.Tensor:
    return torch.randn(*(shape or (4, 3, 9, 8)), dtype=torch.float64)


def results(module: FunctionalModule, x, **options):
    """Output, gradient, gradient of gradient, buffers."""
    params = module.params()
    out, buffers = module.apply_with(params, module.buffers_by_name(), x, **options)
    first = torch.autograd.grad(out.square().mean(), list(params.values()), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), list(params.values()), materialize_grads=True)
    return out, first, second, buffers


def assert_same(net: nn.Module, x=None, **options):
    ours, plain = pair(net, **options)
    x = images() if x is None else x
    torch.testing.assert_close(results(ours, x), results(plain, x), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(results(ours, x)[0], results(plain, x)[0], rtol=1e-12, atol=1e-12)


def head(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.AdaptiveAvgPool1d(5))


@pytest.mark.parametrize(
    ("layer", "taken"),
    [
        (nn.Conv2d(3, 4, 3, padding=1), True),
        (nn.Conv2d(3, 4, 3, padding="same", bias=False), True),
        (nn.Conv2d(3, 4, 1), True),
        (nn.Conv2d(3, 4, 5, padding=2), True),
        (nn.Conv2d(3, 4, 3), False),
        (nn.Conv2d(3, 4, 3, padding=1, stride=2), False),
        (nn.Conv2d(3, 6, 3, padding=1, groups=3), False),
        (nn.Conv2d(3, 4, 3, padding=2, dilation=2), False),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), False),
        (nn.Conv2d(3, 4, 2, padding="same"), False),
        (nn.Conv2d(3, 4, (3, 1), padding="same"), False),
        (nn.utils.spectral_norm(nn.Conv2d(3, 4, 3, padding=1)), False),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1)), False),
    ],
    ids=str,
)
def test_which_convolutions_are_taken(calls, layer, taken):
    ours, plain = pair(head(layer).eval())
    x = images()
    torch.testing.assert_close(
        ours.apply_with({}, {}, x, training=False), plain.apply_with({}, {}, x, training=False), rtol=1e-12, atol=1e-12
    )
    assert calls == ["conv2d"] * taken
    assert list(ours.params()) == list(plain.params())


@pytest.mark.parametrize(
    ("layers", "modules_after"),
    [
        ([nn.ReLU(), nn.MaxPool2d(2)], 0),
        ([nn.LeakyReLU(0.2), nn.MaxPool2d((2, 2), stride=2)], 0),
        ([nn.MaxPool2d(2)], 0),
        ([nn.LeakyReLU(-0.2), nn.MaxPool2d(2)], 2),
        ([nn.Tanh(), nn.MaxPool2d(2)], 2),
        ([nn.ReLU(), nn.MaxPool2d(3)], 1),
        ([nn.ReLU(), nn.MaxPool2d(2, stride=1)], 1),
        ([nn.ReLU(), nn.MaxPool2d(2, padding=1)], 1),
        ([nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)], 1),
        ([nn.ReLU(), nn.MaxPool2d(2, dilation=2)], 1),
        ([nn.ReLU(), nn.AvgPool2d(2)], 1),
    ],
    ids=str,
)
def test_which_layers_a_norm_takes_with_it(calls, layers, modules_after):
    net = head(nn.BatchNorm2d(3), *layers)
    assert_same(net)
    assert set(calls) == {"norm_act_pool"}
    ours, _ = pair(net)
    assert sum(len(link.modules) for link in ours.net.links if link.norm is None) - 2 == modules_after


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.last = nn.Conv2d(3, 3, 1, bias=False)

    def forward(self, x):
        y = self.body(x)
        y += x
        y = self.last(torch.tanh(y))
        y.mul_(0.5)[:, 0].add_(1.0)
        return y


def _after_conv(act: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), act)


def _after_norm(act: nn.Module) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), act, nn.Conv2d(3, 1, 1), copy.deepcopy(act))


@pytest.mark.parametrize(
    "layer",
    [
        *(place(act(inplace=True)) for place in (_after_conv, _after_norm) for act in (nn.ReLU, nn.SiLU, nn.ELU)),
        _after_norm(nn.Hardtanh(inplace=True)),
        Residual(),
    ],
    ids=lambda layer: " ".join(type(m).__name__ for m in layer.modules() if not list(m.children())),
)
def test_layers_that_work_in_place_may_follow(calls, layer):
    assert_same(head(layer))
    assert calls


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_layers_with_hooks_are_left_alone(index):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    module, seen = FunctionalModule(net), []
    module.net[index].register_forward_hook(lambda *_: seen.append(index))
    module.fuse()
    module(module.params(), torch.randn(2, 3, 6, 6))
    assert seen == [index]


def test_a_module_whose_forward_method_was_replaced_is_left_alone(calls):
    module = FunctionalModule(head(nn.Conv2d(3, 4, 3, padding=1)))
    module.net[0].forward = lambda x: 0 * x
    module.fuse()
    assert not module(module.params(), torch.randn(2, 3, 6, 6)).any()
    assert calls == []


class OwnForward(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Branching(nn.Module):
    """Uses slices, single layers and attributes of its sequences."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)]
        self.layers, self.own = nn.Sequential(*layers), OwnForward(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.layers.scale = 2.0

    def forward(self, x):
        assert self.layers[0].padding == (1, 1) and isinstance(self.layers, nn.Sequential)
        y = self.layers[:3](x)
        for layer in self.layers:
            x = layer(x)
        return self.own(x + self.layers.scale * y).mean((2, 3))


def test_nets_may_take_their_sequences_apart(calls):
    assert_same(Branching())
    assert "conv2d" in calls


def test_a_layer_used_in_several_places_runs_in_all_of_them(calls):
    act, norm, conv = nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)
    net = head(conv, norm, act, conv, norm, act, nn.Sequential(conv, act))
    assert_same(net)
    ours, _ = pair(net)
    calls.clear()
    ours(ours.params(), images())
    assert calls == ["conv2d", "norm_act_pool", "conv2d", "norm_act_pool", "conv2d"]


def test_names_stay_and_tied_weights_stay_tied():
    net = head(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1))
    net[2].weight = net[0].weight
    ours, plain = pair(net)
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert list(ours.params()) == list(plain.params()) == ["0.weight", "0.bias", "1.weight", "1.bias", "2.bias"]
    assert_same(net)
    given = {"0.weight": torch.randn(3, 3, 3, 3, dtype=torch.float64)}
    x = images()
    torch.testing.assert_close(ours(given, x), plain(given, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "net",
    [
        Conv4((3, 20, 21), 5, filters=16),
        Conv4((3, 9, 8), 5, filters=6, slope=0.0),
        ResNet12((3, 9, 8), 5, widths=(3, 4, 16, 5)),
        head(nn.BatchNorm2d(3, affine=False, track_running_stats=False), nn.ReLU(), nn.Conv2d(3, 2, 1)),
    ],
    ids=["conv4", "conv4_relu", "resnet12", "no_affine"],
)
def test_whole_nets_give_the_same(calls, net):
    x = images(6, 3, 20, 21) if isinstance(net, Conv4) and net.linear.in_features == 16 else images(6, 3, 9, 8)
    assert_same(net, x)
    assert {"norm_act_pool"} <= set(calls) <= {"norm_act_pool", "conv2d"}


@pytest.mark.parametrize("options", [{"training": False}, {"inductive": True}, {"training": False, "inductive": True}])
def test_steps_evaluation_and_inductive_mode(calls, options):
    ours, plain = pair(
        head(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()), statistics_rows=2, affine_rows=2
    )
    with torch.no_grad():
        for module in (ours, plain):
            module.net[1].weight[1] = 2.0
            module.net[1].running_var[1] = 3.0
    for step in (0, 1, 5):
        found, wanted = (results(module, x, step=step, **options) for x in [images()] for module in (ours, plain))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
    assert ("norm_act_pool" in calls) == ("inductive" not in options)


def test_what_the_kernels_cannot_take_runs_as_before(calls):
    net = head(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    ours, plain = pair(net)
    x = images()
    params = plain.params()
    both = (ours, plain)

    def same(*values):
        torch.testing.assert_close(*values)
        assert calls == []

    same(*(torch.func.vmap(lambda x, m=m: m(params, x))(torch.stack([x, 2 * x])) for m in both))
    same(*(torch.func.grad(lambda p, m=m: m(p, x).sum())(params) for m in both))
    same(*(torch.func.jvp(lambda x, m=m: m(params, x), (x,), (x,)) for m in both))
    with torch.autograd.forward_ad.dual_level():
        duals = {name: torch.autograd.forward_ad.make_dual(p, torch.ones_like(p)) for name, p in params.items()}
        same(*(torch.autograd.forward_ad.unpack_dual(m(duals, x)).tangent for m in both))
    for module in both:
        module.float().autocast = torch.bfloat16
    same(*(m(m.params(), x.float()) for m in both))
    for module in both:
        module.autocast = None
        module.double()
    with pytest.raises(RuntimeError, match="float"):
        ours(params, x.float())
    with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels"):
        ours(params, x[:, :2])
    assert calls == []
    with pytest.raises(RuntimeError, match="too small"):
        ours(params, x[:, :, :1])


def test_a_norm_with_input_of_another_type_runs_as_before(calls):
    ours, plain = pair(head(nn.BatchNorm2d(3)))
    x = images().float()
    torch.testing.assert_close(ours(ours.params(), x), plain(plain.params(), x), rtol=0, atol=0)
    assert calls == []


def test_a_fused_net_is_freed_at_once():
    import gc
    import weakref

    net = FunctionalModule(Conv4((1, 8, 8), 2, filters=4)).net
    fuse(net)
    assert any(isinstance(m, PerStepBatchNorm) for m in net.modules())
    gc.disable()
    try:
        seen = weakref.ref(net)
        del net
        assert seen() is None
    finally:
        gc.enable()
