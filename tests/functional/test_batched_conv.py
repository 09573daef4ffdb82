"""Convolutions with per-task weights under vmap: every way against torch's own convolution, task by task."""

from contextlib import nullcontext
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from metahpo.functional import conv_choice
from metahpo.functional.batched_conv import WAYS, BatchedConvolutions, Layer
from metahpo.functional.conv_choice import batched_convolutions, measured
from metahpo.inner import Mixed, Sqrt
from metahpo.learners import MAML, Phase
from metahpo.tasks.task import Task
from metahpo.training.engines import Loop, Trace, VMap

CPU = torch.device("cpu")
TASKS, IMAGES = 3, 2
CONVS = {
    "plain": lambda: nn.Conv2d(2, 3, 3),
    "same": lambda: nn.Conv2d(2, 3, (2, 3), padding="same", bias=False),
    "valid": lambda: nn.Conv2d(2, 3, 1, padding="valid"),
    "strides": lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 3), padding=(1, 0)),
    "dilated": lambda: nn.Conv2d(2, 3, 3, dilation=(2, 1), padding=(2, 3), stride=2),
    "reflect": lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
    "same circular": lambda: nn.Conv2d(2, 3, 4, padding="same", padding_mode="circular"),
    "groups": lambda: nn.Conv2d(2, 4, 3, groups=2),
}


class Chosen(list):
    """Names one way for all layers, and remembers the layers."""

    def __init__(self, way):
        self.way = way

    def __call__(self, layer):
        self.append(layer)
        return self.way


def derivatives(conv, way, x, params, batched=True):
    """Value, gradients and gradients of the gradients, task by task, of a loss that is not linear in them."""

    def loss(params, x):
        out = functional_call(conv, params, (x,))
        return out.pow(3).sum(), out

    def outer(params, x):
        grads, out = grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        leaves = [*grads[0].values(), grads[1]]
        return sum(g.pow(2).sum() for g in leaves), (out, leaves)

    twice = grad(outer, argnums=(0, 1), has_aux=True)
    if not batched:
        each = [twice({name: p[t] for name, p in params.items()}, x[t]) for t in range(TASKS)]
        return torch.utils._pytree.tree_map(lambda *ts: torch.stack(ts), *each)
    with BatchedConvolutions(way):
        return vmap(twice)(params, x)


def drawn(conv):
    generator = torch.Generator().manual_seed(0)
    params = {
        name: torch.randn(TASKS, *p.shape, dtype=torch.float64, generator=generator)
        for name, p in conv.named_parameters()
    }
    return params, torch.randn(TASKS, IMAGES, 2, 7, 8, dtype=torch.float64, generator=generator)


def assert_equal(found, wanted):
    pairs = zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(wanted), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("conv", CONVS)
def test_each_way_equals_the_convolution_of_each_task(conv, way):
    chosen = Chosen(way)
    layer = CONVS[conv]().double()
    params, x = drawn(layer)
    assert_equal(derivatives(layer, chosen, x, params), derivatives(layer, chosen, x, params, batched=False))
    assert len(chosen) == (0 if conv == "groups" else 1)


@pytest.mark.parametrize("way", WAYS)
def test_each_way_in_forward_mode_over_reverse(way):
    params, x = drawn(nn.Conv2d(2, 3, 3))

    def slope(w, x, v):
        return jvp(grad(lambda w: F.conv2d(x, w, padding=1).pow(3).sum()), (w,), (v,))[1]

    v = torch.randn_like(params["weight"])
    with BatchedConvolutions(Chosen(way)):
        found = vmap(slope)(params["weight"], x, v)
    assert_equal(found, torch.stack([slope(*each) for each in zip(params["weight"], x, v)]))


def test_no_way_falls_back_to_a_loop_over_tasks():
    conv = CONVS["plain"]().double()
    params, x = drawn(conv)
    before = torch._C._functorch._is_vmap_fallback_enabled()
    torch._C._functorch._set_vmap_fallback_enabled(False)
    try:
        for way in WAYS:
            derivatives(conv, Chosen(way), x, params)
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(before)


def test_shared_weights_and_shared_images_stay_one_convolution():
    params, x = drawn(nn.Conv2d(2, 3, 3))
    shared, per_task = params["weight"][0], params["weight"]

    def gradient(w, x):
        return grad(lambda w: F.conv2d(x, w).pow(2).sum())(w)

    chosen = Chosen("columns")
    with BatchedConvolutions(chosen):
        vmap(gradient, in_dims=(None, 0))(shared, x)
        vmap(gradient, in_dims=(0, None))(per_task, x[0])
        gradient(shared, x[0])
        assert not chosen
        vmap(gradient)(per_task, x)
    assert [layer.tasks for layer in chosen] == [TASKS]


def learner_and_tasks(**settings):
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 3)),
    )
    learner = MAML(net, steps=2, **settings).double()
    x = torch.randn(TASKS, 9, 1, 8, 8, dtype=torch.float64)
    y = torch.arange(3).repeat(3).expand(TASKS, 9)
    return learner, Task(x[:, :3], y[:, :3], x[:, 3:], y[:, 3:])


@pytest.mark.parametrize(
    ("engine", "way", "settings"),
    [
        *product([VMap], ["columns", "channels_last"], [{}, {"gradient": Mixed()}, {"remat": Sqrt()}]),
        (Trace, "channels_last", {}),
        (Trace, "columns", {"gradient": Mixed(), "remat": Sqrt()}),
    ],
    ids=str,
)
def test_engines_run_every_way(monkeypatch, engine, way, settings):
    learner, tasks = learner_and_tasks(**settings)
    wanted = Loop().meta_gradient(learner, tasks, Phase(training=True))
    chosen = Chosen(way)
    monkeypatch.setattr("metahpo.functional.module.batched_convolutions", lambda inputs: BatchedConvolutions(chosen))
    found = engine().meta_gradient(learner, tasks, Phase(training=True))
    assert_equal(found.losses, wanted.losses)
    for name, g in wanted.grads.items():
        torch.testing.assert_close(found.grads[name], g, rtol=1e-8, atol=1e-10, msg=name)
    # The first pass is on shared weights; the second on the support set and the one on the query set are not.
    assert {layer.x[0] for layer in chosen} == {3, 6}
    assert {layer.for_x for layer in chosen if layer.x[1] == 1} == {False}


def test_the_recorded_program_holds_the_chosen_way():
    conv = CONVS["plain"]().double()
    params, x = drawn(conv)
    record = make_fx(lambda params, x: derivatives(conv, Chosen("columns"), x, params))(params, x)
    assert not [node for node in record.graph.nodes if "convolution" in str(node.target)]
    assert_equal(record(params, x), derivatives(conv, None, x, params, batched=False))


def test_autocast_lowers_every_way_alike():
    params, x = drawn(nn.Conv2d(2, 3, 3))
    w, x = params["weight"].float(), x.float()
    outs = {}
    for way in WAYS:
        with BatchedConvolutions(Chosen(way)), torch.autocast("cpu", torch.bfloat16):
            outs[way] = vmap(lambda x, w: F.conv2d(x, w))(x, w)
    for out in outs.values():
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, outs["grouped"], rtol=0.02, atol=0.05)


def test_the_cpu_is_left_alone():
    found = []
    vmap(lambda x: found.append(batched_convolutions([x])) or x)(torch.ones(2, 1))
    assert isinstance(found[0], nullcontext)


def measuring(monkeypatch, seconds):
    """``measured`` with given times; the returned list says what was timed."""
    names = {way: name for name, way in WAYS.items()}
    timed = []

    def time(way, layer, device):
        timed.append(names[way])
        return seconds[names[way]]

    monkeypatch.setattr(conv_choice, "_fastest", {})
    monkeypatch.setattr(conv_choice, "_seconds", time)
    return timed


LAYER = Layer(2, (2, 2, 5, 5), (3, 2, 3, 3), True, (1, 1), ((1, 1), (1, 1)), (1, 1), torch.float32, True)


def test_the_fastest_way_is_taken_if_clearly_faster_and_timed_once(monkeypatch):
    timed = measuring(monkeypatch, {"grouped": 1.0, "columns": 0.5, "channels_last": 0.7})
    assert measured(LAYER, CPU) == measured(LAYER, CPU) == "columns"
    assert sorted(timed) == sorted(WAYS)
    measuring(monkeypatch, {"grouped": 1.0, "columns": 0.98, "channels_last": float("inf")})
    assert measured(LAYER, CPU) == "grouped"


def test_measuring_inside_a_recording_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(conv_choice, "_fastest", {})
    conv = CONVS["plain"]().double()
    params, x = drawn(conv)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    record = make_fx(lambda params, x: derivatives(conv, lambda layer: measured(layer, CPU), x, params))(params, x)
    assert torch.equal(state, torch.get_rng_state())
    assert not [node for node in record.graph.nodes if "rand" in str(node.target)]
    assert next(iter(conv_choice._fastest.values())) in WAYS
    assert_equal(record(params, x), derivatives(conv, None, x, params, batched=False))


def test_nothing_is_timed_inside_a_backward_pass(monkeypatch):
    timed = measuring(monkeypatch, dict.fromkeys(WAYS, 1.0))
    x = torch.ones(1, requires_grad=True)
    found = []
    x.register_hook(lambda g: found.append(measured(LAYER, CPU)))
    x.sum().backward()
    assert found == ["grouped"] and not timed


def test_a_way_that_cannot_run_is_never_the_fastest():
    def fails(*_):
        raise RuntimeError("no kernel")

    assert conv_choice._seconds(fails, LAYER, CPU) == float("inf")
    assert all(conv_choice._seconds(way, LAYER, CPU) < 60 for way in WAYS.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("engine", [VMap, Trace])
def test_cuda_measures_and_agrees_with_loop(monkeypatch, engine):
    monkeypatch.setattr(conv_choice, "_fastest", {})
    learner, tasks = learner_and_tasks()
    wanted = Loop().meta_gradient(learner, tasks, Phase(training=True)).grads
    found = engine().meta_gradient(learner.cuda(), Task(*(t.cuda() for t in tasks)), Phase(training=True)).grads
    device = torch.device("cuda", torch.cuda.current_device())
    assert all(conv_choice._seconds(way, LAYER, device) < 60 for way in WAYS.values())
    assert conv_choice._fastest and set(conv_choice._fastest.values()) <= set(WAYS)
    for name, g in wanted.items():
        torch.testing.assert_close(found[name].cpu(), g, rtol=1e-8, atol=1e-10)
