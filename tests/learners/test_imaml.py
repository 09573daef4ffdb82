"""iMAML against the exact minimum, and its memory."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metahpo.errors import NetError
from metahpo.hypergrad.measure import measured
from metahpo.learners import IMAML, MAML, Phase
from metahpo.nets import Conv4
from metahpo.tasks import Task
from metahpo.training.engines import Loop, VMap

STRENGTH = 0.5


def linear_tasks() -> Task:
    """Two linear regressions of 6 inputs, whose inner minimum is known."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 12, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 12, 1, generator=generator, dtype=torch.float64)
    return Task(x[:, :8], y[:, :8], x[:, 8:], y[:, 8:])


def linear_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 1, bias=False)).double()


def exact_gradient(net: nn.Module, tasks: Task) -> torch.Tensor:
    """Through the closed form (A + strength) w = b + strength theta of the minimum, by autograd."""
    theta = net[0].weight.detach().clone().requires_grad_()
    total = 0
    for t in range(2):
        x, y = tasks.support_x[t], tasks.support_y[t]
        a = 2 * x.mT @ x / len(x) + STRENGTH * torch.eye(6, dtype=torch.float64)
        w = torch.linalg.solve(a, 2 * x.mT @ y / len(x) + STRENGTH * theta.mT)
        total = total + F.mse_loss(tasks.query_x[t] @ w, tasks.query_y[t]) / 2
    return torch.autograd.grad(total, theta)[0]


@pytest.mark.parametrize("engine", [Loop(), VMap()], ids=lambda engine: engine.name)
def test_the_gradient_tends_to_the_exact_one_with_cg_steps(engine):
    net, tasks = linear_net(), linear_tasks()
    exact, errors = exact_gradient(net, tasks), []
    for cg_steps in range(8):
        options = {"steps": 160, "inner_lr": 0.25, "strength": STRENGTH, "cg_steps": cg_steps, "loss": F.mse_loss}
        learner = IMAML(net, **options).double()
        grad = engine.meta_gradient(learner, tasks, Phase(training=True)).grads["module.net.0.weight"]
        errors.append(float((grad - exact).norm() / exact.norm()))
    # Each step of conjugate gradients is nearer; with as many as there are weights it is exact.
    assert all(later < 0.9 * earlier for earlier, later in itertools.pairwise(errors[1:7])), errors
    assert errors[0] > 0.3 and errors[6] < 1e-8 and errors[7] < 1e-8, errors


def test_what_the_outer_loop_alone_learns_has_its_implicit_gradient():
    """Batch-norm scales move the minimum too: against differences of the fully converged learner."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    learner = IMAML(net, steps=100, inner_lr=0.3, strength=1.0, cg_steps=40).double()
    torch.manual_seed(1)  # With another draw the Hessian may have negative curvature, and the minimum jump.
    x, y = torch.randn(1, 15, 3, dtype=torch.float64), torch.arange(3).repeat(1, 5)
    tasks = Task(x[:, :9], y[:, :9], x[:, 9:], y[:, 9:])
    grads = Loop().meta_gradient(learner, tasks, Phase(training=True)).grads
    for name, param in learner.outer_params().items():
        flat, values = param.data.view(-1), []
        old = flat[1].item()
        for shift in (1e-4, -1e-4):
            flat[1] = old + shift
            with torch.no_grad():
                values.append(learner.meta_loss(tasks.select(0), Phase(training=True))[0].item())
        flat[1] = old
        assert abs((values[0] - values[1]) / 2e-4 - grads[name].reshape(-1)[1].item()) < 1e-6, name


def test_memory_does_not_grow_with_the_steps():
    torch.manual_seed(0)
    net, x, y = Conv4((1, 28, 28), 5, filters=8), torch.rand(1, 30, 1, 28, 28), torch.arange(5).repeat(1, 6)
    tasks, peaks = Task(x[:, :15], y[:, :15], x[:, 15:], y[:, 15:]), {}
    for kind in (IMAML, MAML):
        for steps in (2, 24):
            learner = kind(net, steps=steps)

            def work(learner=learner):
                return Loop().meta_gradient(learner, tasks, Phase(training=True))

            work()
            peaks[kind, steps] = measured(work, torch.device("cpu"))[2]
    if peaks[IMAML, 2] is None:
        pytest.skip("the peak of the resident set is Linux's to tell")
    assert peaks[IMAML, 24] < 1.3 * peaks[IMAML, 2] + 2**21, peaks
    assert peaks[MAML, 24] > 4 * peaks[MAML, 2], peaks


def test_settings_that_cannot_be():
    with pytest.raises(NetError, match="strength > 0 and cg_steps >= 0, found 0 and 5"):
        IMAML(linear_net(), strength=0)
