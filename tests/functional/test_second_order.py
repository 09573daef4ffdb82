from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from metahpo.errors import NetError
from metahpo.hypergrad import CG, FiniteDifference, FixedPoint, Forward, Implicit, Unroll
from metahpo.inner import SGD, FirstOrder, InnerProblem, Sqrt
from metahpo.learners import MAML, Phase
from metahpo.tasks import Task
from metahpo.training.engines import Auto, Loop, Threads, VMap

X = torch.arange(24.0).sin().view(4, 6)
Y = torch.tensor([0, 1, 2, 0])


class OnceSine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, slope: Tensor) -> Tensor:
        return slope * ctx.saved_tensors[0].cos()


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OnceSine.apply(x)


class Aligned(nn.Module):
    """The input plus a connectionist temporal loss, whose kernel has no second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.stack([x, -x], 2).log_softmax(2).transpose(0, 1)
        lengths = torch.full((len(x),), x.shape[1])
        targets = torch.ones(len(x), 2, dtype=torch.long)
        return x + F.ctc_loss(steps, targets, lengths, lengths.clamp(max=2))


class Images(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, :, None, None])[:, :, 0, 0]


LAYERS = {
    "mid.layer": ("CrossMapLRN2d", lambda: Images(nn.CrossMapLRN2d(2))),
    "mid.1": ("Sine", lambda: nn.Sequential(nn.Tanh(), Sine())),
    "mid": ("Aligned", Aligned),
}


def net_with(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("first", nn.Linear(6, 6))
    net.add_module("mid", LAYERS[name][1]())
    net.add_module("last", nn.Linear(6, 3))
    return net


TASKS = Task(*(torch.stack([t, t.flip(0)]) for t in (X, Y, X.roll(1, 1), Y)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("engine", [Loop, Threads, VMap, Auto])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_without_a_second_derivative_is_named_with_what_does_not_need_it(name, engine):
    with pytest.raises(NetError) as refused:
        engine().meta_gradient(MAML(net_with(name), steps=2), TASKS, Phase(training=True))
    line = str(refused.value)
    assert f"module {name!r} ({LAYERS[name][0]}) has no second derivative" in line, line
    assert "first_order" in line and "\n" not in line


@pytest.mark.parametrize("engine", [Loop, Threads])
@pytest.mark.parametrize("name", LAYERS)
def test_first_order_runs_such_a_layer_as_a_plain_loop_does(name, engine):
    net = net_with(name)
    found = engine().meta_gradient(MAML(net, steps=1, first_order=True), TASKS, Phase(training=True))
    wanted = [torch.zeros_like(p) for p in net.parameters()]
    for i in range(2):
        params = dict(net.named_parameters())
        loss = F.cross_entropy(functional_call(net, params, TASKS.support_x[i]), TASKS.support_y[i])
        grads = torch.autograd.grad(loss, list(params.values()))
        params = {n: (p - 0.1 * g).detach().requires_grad_() for (n, p), g in zip(params.items(), grads)}
        loss = F.cross_entropy(functional_call(net, params, TASKS.query_x[i]), TASKS.query_y[i]) / 2
        wanted = [w + g for w, g in zip(wanted, torch.autograd.grad(loss, list(params.values())))]
    torch.testing.assert_close(list(found.grads.values()), wanted, rtol=1e-4, atol=1e-6)


STRATEGIES = {
    "unroll": (Unroll(), "first_order"),
    "remat": (Unroll(remat=Sqrt()), "first_order"),
    "cg": (Implicit(CG()), r"FiniteDifference\(\)"),
    "fixed_point": (Implicit(FixedPoint()), r"FiniteDifference\(\)"),
    "forward": (Forward(), r"FiniteDifference\(\)"),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", LAYERS)
def test_hypergradients_name_such_a_layer_and_what_does_not_need_it(name, strategy):
    net = net_with(name)
    params = {n: p.detach() for n, p in net.named_parameters()}

    def inner(params, hparams, batch):
        return F.cross_entropy(functional_call(net, params, batch), Y) * hparams["scale"]

    def outer(params, hparams):
        return F.cross_entropy(functional_call(net, params, X.roll(1, 1)), Y)

    given = (InnerProblem(inner), SGD(0.1), outer, params, {"scale": torch.tensor(1.0)}, [X] * 2)
    run, instead = STRATEGIES[strategy]
    with pytest.raises(NetError, match=rf"module '{name}' \({LAYERS[name][0]}\) has no second .*{instead}"):
        run(*given)
    for other in (Unroll(gradient=FirstOrder()), FiniteDifference()):
        assert torch.isfinite(other(*given).value)


def test_a_loss_without_a_second_derivative_is_said_to_be_no_layer():
    learner = MAML(nn.Linear(6, 3), steps=1, loss=F.multi_margin_loss)
    with pytest.raises(NetError, match=r"^the loss.*multi_margin_loss.*first_order"):
        Loop().meta_gradient(learner, TASKS, Phase(training=True))
