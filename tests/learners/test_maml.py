"""MAML and MAML++: engines, switches, schedules, and finite differences."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metahpo.learners import MAML, Improvements, MAMLPlusPlus, Phase
from metahpo.learners.phase import multi_step_weights
from metahpo.nets import MLP, Conv4
from metahpo.tasks import Sinusoid, Task
from metahpo.training.engines import Loop, VMap

SWITCHES = {
    "multi_step_epochs": (0, 4),
    "first_order_epochs": (0, 3),
    "per_step_statistics": (False, True),
    "per_step_affine": (False, True),
    "layer_step_rates": (False, True),
}


def image_tasks(count: int = 3, ways: int = 3, size: int = 8) -> Task:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 4 * ways, 1, size, size, generator=generator, dtype=torch.float64)
    y = torch.arange(ways).repeat(count, 4)
    return Task(x[:, :ways], y[:, :ways], x[:, ways:], y[:, ways:])


def conv(ways: int = 3, size: int = 8) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Conv4((1, size, size), ways, filters=3).double()


def assert_same(first, second, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(first.loss, second.loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(first.grads, second.grads, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(first.metrics, second.metrics, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(first.losses, second.losses, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("values", list(itertools.product(*SWITCHES.values())))
def test_engines_agree_for_every_combination_of_switches(values):
    learner = MAMLPlusPlus(conv(), steps=2, **dict(zip(SWITCHES, values))).double()
    phase = learner.training_phase(1)
    assert_same(
        Loop().meta_gradient(learner, image_tasks(), phase), VMap().meta_gradient(learner, image_tasks(), phase)
    )


@pytest.mark.parametrize("options", [{}, {"first_order": True}, {"adapt_norms": True}, {"steps": 1}])
def test_engines_agree_for_maml(options):
    learner = MAML(conv(), **{"steps": 2, **options}).double()
    phase = learner.training_phase(0)
    assert_same(
        Loop().meta_gradient(learner, image_tasks(), phase), VMap().meta_gradient(learner, image_tasks(), phase)
    )


def test_engines_agree_in_evaluation():
    learner = MAMLPlusPlus(conv(), steps=2).double()
    loop, vmap = (engine.evaluate(learner, image_tasks(), Phase()) for engine in (Loop(), VMap()))
    torch.testing.assert_close(loop, vmap, rtol=1e-10, atol=1e-10)
    assert set(loop[0]) >= {"loss", "accuracy", "accuracy_inductive", "accuracy_before"}


def test_all_switches_off_is_maml_exactly():
    plain = MAML(conv(), steps=3, inner_lr=0.2)
    off = MAMLPlusPlus(conv(), steps=3, inner_lr=0.2, **{name: values[0] for name, values in SWITCHES.items()})
    first = Loop().meta_gradient(plain.double(), image_tasks(), plain.training_phase(0))
    second = Loop().meta_gradient(off.double(), image_tasks(), off.training_phase(0))
    assert first.grads.keys() == second.grads.keys()
    assert_same(first, second, tolerance=0)


@pytest.mark.parametrize("first_order", [False, True])
def test_one_step_by_hand(first_order):
    # Without norms, one inner step written out with plain autograd.
    net = MLP([3], 2, hidden=[5]).double()
    learner = MAML(net, steps=1, inner_lr=0.25, first_order=first_order).double()
    x, y = torch.randn(2, 6, 3, dtype=torch.float64), torch.randint(0, 2, (2, 6))
    task = Task(x[:, :3], y[:, :3], x[:, 3:], y[:, 3:])
    found = Loop().meta_gradient(learner, task, learner.training_phase(0))
    params, total = dict(net.named_parameters()), 0
    for t in range(2):
        loss = F.cross_entropy(torch.func.functional_call(net, params, (x[t, :3],)), y[t, :3])
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=not first_order)
        fast = {name: p - 0.25 * g for (name, p), g in zip(params.items(), grads)}
        total = total + F.cross_entropy(torch.func.functional_call(net, fast, (x[t, 3:],)), y[t, 3:]) / 2
    expected = torch.autograd.grad(total, list(params.values()))
    for (name, _), grad in zip(params.items(), expected):
        torch.testing.assert_close(found.grads[f"module.net.{name}"], grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("engine", [Loop(), VMap()])
def test_outer_gradient_equals_finite_differences(engine):
    # Smooth throughout (tanh, no max pooling), so that differences converge.
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    learner = MAMLPlusPlus(net, steps=3).double()
    x, y = torch.randn(2, 15, 3, dtype=torch.float64), torch.arange(3).repeat(2, 5)
    tasks, phase = Task(x[:, :6], y[:, :6], x[:, 6:], y[:, 6:]), learner.training_phase(1)
    grads = engine.meta_gradient(learner, tasks, phase).grads
    for name, param in learner.outer_params().items():
        flat, found = param.data.view(-1), grads[name].reshape(-1)
        for index in range(0, flat.numel(), 3):
            values, old = [], flat[index].item()
            for shift in (1e-5, -1e-5):
                flat[index] = old + shift
                values.append(engine.meta_gradient(learner, tasks, phase).loss.item())
            flat[index] = old
            assert abs((values[0] - values[1]) / 2e-5 - found[index].item()) < 1e-7, name


def test_multi_step_weights_follow_the_authors_schedule():
    torch.testing.assert_close(multi_step_weights(0, 5, 10), torch.full((5,), 0.2, dtype=torch.float64))
    halfway = multi_step_weights(5, 5, 10)
    torch.testing.assert_close(halfway, torch.tensor([0.1, 0.1, 0.1, 0.1, 0.6], dtype=torch.float64))
    late = multi_step_weights(9, 5, 9)
    torch.testing.assert_close(late, torch.tensor([0.006] * 4 + [0.976], dtype=torch.float64))


def test_phases_follow_the_switches():
    switches = Improvements(multi_step_epochs=2, first_order_epochs=1)
    phases = [switches.training_phase(epoch, 3) for epoch in range(3)]
    assert [phase.first_order for phase in phases] == [True, False, False]
    assert [phase.step_weights is not None for phase in phases] == [True, True, False]
    assert all(phase.training for phase in phases)


def test_multi_step_loss_is_the_weighted_sum_over_steps():
    learner = MAML(conv(), steps=3).double()
    task = image_tasks(1).select(0)
    weights = torch.tensor([0.5, 0.3, 0.2])
    total, _ = learner.meta_loss(task, Phase(training=True, step_weights=weights))
    parts = []
    for steps in (1, 2, 3):
        shorter = MAML(conv(), steps=steps).double()
        parts.append(shorter.meta_loss(task, Phase(training=True))[0])
    torch.testing.assert_close(total, (torch.stack(parts) * weights.double()).sum())


def test_inductive_outputs_do_not_depend_on_the_other_queries():
    learner = MAMLPlusPlus(conv(), steps=2).double()
    tasks = image_tasks()
    for _ in range(3):
        learner.update_buffers(Loop().meta_gradient(learner, tasks, learner.training_phase(0)).metrics["buffers"])
    task = tasks.select(0)
    together = learner.outputs(task, Phase())
    adapted = learner.adapt(task.support_x, task.support_y, Phase(inductive=True))
    alone = torch.cat([learner.predict(adapted, x[None]) for x in task.query_x])
    torch.testing.assert_close(together["inductive"], alone)
    assert not torch.allclose(together["inductive"], together["after"])


def test_running_statistics_are_the_mean_over_tasks_and_only_in_training():
    learner = MAMLPlusPlus(conv(), steps=2).double()
    before = {name: b.clone() for name, b in learner.named_buffers()}
    buffers = Loop().meta_gradient(learner, image_tasks(), learner.training_phase(0)).metrics["buffers"]
    assert set(buffers) == set(before)
    for name, value in learner.named_buffers():
        assert torch.equal(value, before[name]), "an engine writes nothing into the learner"
        assert not torch.equal(buffers[name], before[name])
    Loop().evaluate(learner, image_tasks(), Phase())
    for name, value in learner.named_buffers():
        assert torch.equal(value, before[name])


def test_sinusoid_adapts_by_mean_squared_error():
    learner = MAML(MLP([1], 1), steps=5, inner_lr=0.01, loss=F.mse_loss)
    metrics, outputs = VMap().evaluate(learner, Sinusoid().batch(range(4)), Phase())
    assert outputs["after"].shape == (4, 10, 1)
    assert "accuracy" not in metrics
    assert metrics["loss"].mean() < metrics["loss_before"].mean()


@pytest.mark.parametrize("inductive", [False, True])
def test_a_fitted_net_is_a_plain_module_with_the_learners_predictions(inductive):
    learner = MAMLPlusPlus(conv(), steps=2).double()
    task = image_tasks().select(0)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    net = learner.fitted(task.support_x, task.support_y, inductive=inductive)
    expected = learner.outputs(task, Phase())["inductive" if inductive else "after"]
    torch.testing.assert_close(net(task.query_x), expected)
    torch.testing.assert_close(dict(learner.state_dict()), before, rtol=0, atol=0)
