"""iMAML against the exact minimum, and its memory."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metahpo.errors import NetError
from metahpo.hypergrad.measure import measured
from metahpo.inner import SGD, AdamW, ByLayer
from metahpo.inner.linear_solve import damped_solve
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


def exact_gradient(net: nn.Module, tasks: Task, decay: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Through the closed form (A + strength + decay) w = b + strength theta of the minimum, by autograd."""
    theta = net[0].weight.detach().clone().requires_grad_()
    total = 0
    for t in range(2):
        x, y = tasks.support_x[t], tasks.support_y[t]
        a = 2 * x.mT @ x / len(x) + (STRENGTH + decay) * torch.eye(6, dtype=torch.float64)
        w = torch.linalg.solve(a, 2 * x.mT @ y / len(x) + STRENGTH * theta.mT)
        total = total + F.mse_loss(tasks.query_x[t] @ w, tasks.query_y[t]) / 2
    if isinstance(decay, torch.Tensor):
        return torch.stack(torch.autograd.grad(total, [theta, decay])[1:])
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


@pytest.mark.parametrize("engine", [Loop(), VMap()], ids=lambda engine: engine.name)
@pytest.mark.parametrize("rule", [SGD, ByLayer])
def test_a_weight_decay_of_the_rule_is_part_of_the_minimum(engine, rule):
    net, tasks = linear_net(), linear_tasks()
    own = SGD(0.15, momentum=0.25, weight_decay=0.5, learnable=True)
    own = own if rule is SGD else ByLayer(own, ["0.weight"])
    options = {"steps": 150, "rule": own, "strength": STRENGTH, "cg_steps": 8, "loss": F.mse_loss}
    grads = engine.meta_gradient(IMAML(net, **options).double(), tasks, Phase(training=True)).grads
    torch.testing.assert_close(grads["module.net.0.weight"], exact_gradient(net, tasks, 0.5), rtol=1e-8, atol=1e-10)
    decay = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    expected = exact_gradient(net, tasks, decay)
    torch.testing.assert_close(grads["rule.weight_decay"].flatten(), expected, rtol=1e-8, atol=1e-10)


def test_a_decay_that_is_taken_off_the_parameters_is_refused():
    with pytest.raises(NetError, match="AdamW takes weight_decay off the parameters"):
        IMAML(linear_net(), rule=AdamW(0.1))


def indefinite() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    values = torch.tensor([-0.4, -0.1, 0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.T, torch.randn(6, generator=generator, dtype=torch.float64)


def test_negative_curvature_is_damped_away():
    matrix, b = indefinite()
    for scale in (1.0, 1e-9):
        x, damping = damped_solve(lambda v, scale=scale: scale * matrix @ v, b, 40)
        damped = scale * matrix + damping * torch.eye(6, dtype=torch.float64)
        assert float(torch.linalg.eigvalsh(damped)[0]) > 0
        assert float(damping) < 4 * scale
        torch.testing.assert_close(x, torch.linalg.solve(damped, b), rtol=1e-6, atol=0)
    # Positive curvature is left alone, and so is a zero.
    square = matrix @ matrix
    x, damping = damped_solve(lambda v: square @ v, b, 6)
    torch.testing.assert_close(x, torch.linalg.solve(square, b), rtol=1e-8, atol=0)
    assert float(damping) == 0 and not damped_solve(lambda v: square @ v, 0 * b, 6)[0].any()


@pytest.mark.parametrize("engine", [Loop(), VMap()], ids=lambda engine: engine.name)
def test_an_inner_point_that_is_no_minimum_is_told(engine):
    """A loss of constant negative curvature, so that the system is known: strength I - 2 x'x / n."""
    net, tasks = linear_net(), linear_tasks()
    loss = lambda outputs, targets: -0.3 * outputs.square().mean() + targets.mean()  # noqa: E731
    learner = IMAML(net, steps=2, inner_lr=0.1, strength=STRENGTH, cg_steps=40, loss=loss).double()
    with pytest.warns(UserWarning, match="negative curvature where the inner loop ends") as told:
        grads = engine.meta_gradient(learner, tasks, Phase(training=True)).grads
    assert "damped by about " in "".join(str(w.message) for w in told)
    total, eye = 0, torch.eye(6, dtype=torch.float64)
    for t in range(2):
        x, query = tasks.support_x[t], tasks.query_x[t]
        system = STRENGTH * eye - 0.6 * x.mT @ x / len(x)
        assert float(torch.linalg.eigvalsh(system)[0]) < 0
        w = learner.adapt(x, tasks.support_y[t], Phase(training=True)).params["0.weight"].detach()
        slope = -0.6 * w[0] @ query.mT @ query / len(query)
        damped = system + damped_solve(lambda v, system=system: system @ v, slope, 40)[1] * eye
        total = total + STRENGTH * torch.linalg.solve(damped, slope) / 2
    torch.testing.assert_close(grads["module.net.0.weight"][0], total, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("engine", [Loop(), VMap()], ids=lambda engine: engine.name)
def test_an_inner_loop_that_is_too_short_is_told(engine):
    """Where the loss is flat each step leaves 1 - rate * strength of the first gradient; here about 0.8^steps."""
    loss = lambda outputs, targets: outputs.mean() + 0.0 * targets.mean()  # noqa: E731
    for steps, told in ((2, ["iMAML: the inner gradient at the end is up to 6e-01"]), (8, [])):
        learner = IMAML(linear_net(), steps=steps, inner_lr=0.1, strength=2.0, loss=loss).double()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            engine.meta_gradient(learner, linear_tasks(), Phase(training=True))
        assert sorted({str(each.message)[:51] for each in found}) == told


@pytest.mark.parametrize("engine", [Loop(), VMap()], ids=lambda engine: engine.name)
def test_random_numbers_that_cannot_be_drawn_again_are_refused(engine):
    class Own(nn.Module):
        generator = torch.Generator()

        def forward(self, x):
            return x * torch.rand(x.shape[-1], generator=self.generator, dtype=x.dtype)

    learner = IMAML(nn.Sequential(Own(), linear_net()), loss=F.mse_loss).double()
    with pytest.raises(NetError, match=r"when it is computed again.* draw them from torch's generator"):
        engine.meta_gradient(learner, linear_tasks(), Phase(training=True))


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
