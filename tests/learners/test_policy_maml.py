"""Policy gradients and the outer gradients through them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metahpo.errors import NetError
from metahpo.learners import Phase, PolicyMAML
from metahpo.rl import Navigation, Step
from metahpo.tasks import RolloutTasks, Task
from metahpo.training.engines import Loop, Trace, VMap


class Bandit:
    """One step, whose reward is the product of the action and the task's parameters."""

    name, observation_size, action_size = "bandit", 1, 2

    def draw(self, rng, episodes):
        raise NotImplementedError

    def reset(self, parameters):
        return None, torch.ones_like(parameters[:, :1])

    def step(self, state, actions, parameters):
        rewards = (actions * parameters).sum(-1)
        return Step(None, torch.ones_like(parameters[:, :1]), rewards, rewards > torch.inf)


def learner(**options) -> PolicyMAML:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
    return PolicyMAML(net, Navigation(), **{"inner_lr": 0.5, **options}).double()


def navigation_tasks(count: int = 2) -> Task:
    return RolloutTasks(Navigation(), episodes=4, horizon=6).batch(range(count)).to(torch.float64)


def test_the_policy_gradient_has_its_known_expectation():
    # With normal actions and a linear reward c a the advantage is c (a - mean) / (|c| std), and the gradient is
    # c / (|c| std) for the mean, zero for the deviation.
    torch.manual_seed(0)
    made = PolicyMAML(nn.Linear(1, 2), Bandit(), initial_std=0.5).double()
    c = torch.tensor([3.0, -4.0], dtype=torch.float64).expand(200_000, 2)
    params = made.initial(Phase()).params
    rollout = made.roll_out(params, torch.randn(200_000, 1, 2, dtype=torch.float64), c)
    names = ["mean.bias", "log_std"]
    found = torch.autograd.grad(made.surrogate(params, rollout), [params[name] for name in names])
    torch.testing.assert_close(-found[0], c[0] / (5 * 0.5), atol=0.02, rtol=0)
    torch.testing.assert_close(found[1], torch.zeros(2, dtype=torch.float64), atol=0.02, rtol=0)


def frozen_loss(made: PolicyMAML, task: Task, rate: float = 0.5):
    """The outer loss of one inner step as a function of the initial policy, the episodes held as they are now."""
    start = {name: p.detach() for name, p in made.initial(Phase()).params.items()}

    def inner(params, rollout):
        return torch.func.grad(lambda p: made.surrogate(p, rollout))(params)

    support = made.roll_out(start, task.support_x, task.support_y)
    adapted = {name: p - rate * g for (name, p), g in zip(start.items(), inner(start, support).values())}
    query = made.roll_out(adapted, task.query_x, task.query_y)

    def loss(params):
        grads = inner(params, support)
        return made.surrogate({name: p - rate * grads[name] for name, p in params.items()}, query)

    return loss, start, adapted, query


@pytest.mark.parametrize("engine", [Loop(), VMap()])
def test_the_outer_gradient_is_that_of_frozen_episodes(engine):
    # Were there a gradient through the environment, which is differentiable, it would be another.
    made, tasks = learner(), navigation_tasks(1)
    found = engine.meta_gradient(made, tasks, made.training_phase(0))
    loss, start, _, _ = frozen_loss(made, tasks.select(0))
    torch.testing.assert_close(found.loss, loss(start))
    for name, value in start.items():
        for index in range(0, value.numel(), 3):
            shift = torch.zeros_like(value)
            shift.view(-1)[index] = 1e-5
            slope = (loss({**start, name: value + shift}) - loss({**start, name: value - shift})) / 2e-5
            assert abs(slope - found.grads[f"module.net.{name}"].reshape(-1)[index]) < 1e-8, name


def test_the_first_order_gradient_is_that_at_the_adapted_policy():
    made, tasks = learner(first_order=True), navigation_tasks(1)
    found = Loop().meta_gradient(made, tasks, made.training_phase(0)).grads
    _, _, adapted, query = frozen_loss(made, tasks.select(0))
    expected = torch.func.grad(lambda params: made.surrogate(params, query))(adapted)
    second = Loop().meta_gradient(learner(), tasks, made.training_phase(0)).grads
    for name, grad in expected.items():
        torch.testing.assert_close(found[f"module.net.{name}"], grad)
    assert (found["module.net.log_std"] - second["module.net.log_std"]).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"steps": 2, "layer_step_rates": True}, {"first_order": True, "gae": 0.9}])
def test_engines_agree(options):
    made, tasks = learner(**options), navigation_tasks()
    phase = made.training_phase(0)
    expected = Loop().meta_gradient(made, tasks, phase)
    assert all(grad.abs().max() > 0 for grad in expected.grads.values())
    for engine in (VMap(), Trace()):
        found = engine.meta_gradient(made, tasks, phase)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    loop, vmap = (engine.evaluate(made, tasks, Phase()) for engine in (Loop(), VMap()))
    torch.testing.assert_close(loop, vmap, rtol=1e-9, atol=1e-11)
    assert set(loop[0]) == {"return", "return_before", "loss"}
    torch.testing.assert_close(loop[0]["return"], loop[1]["after"].mean(-1))
    assert not torch.equal(loop[0]["return"], loop[0]["return_before"])


def test_each_inner_step_has_its_own_episodes():
    made, task = learner(steps=2), navigation_tasks().select(0)
    once = learner(steps=1)
    first = once.adapt(task.support_x[:2], task.support_y[:2], Phase())
    once.module.net.load_state_dict(first.params)
    second = once.adapt(task.support_x[2:], task.support_y[2:], Phase())
    torch.testing.assert_close(made.adapt(task.support_x, task.support_y, Phase()).params, second.params)
    with pytest.raises(NetError, match="4 support episodes cannot be shared evenly among 3 inner steps"):
        learner(steps=3).adapt(task.support_x, task.support_y, Phase())


def test_batch_norm_is_refused():
    with pytest.raises(NetError, match="Sequential has batch norm"):
        PolicyMAML(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), Navigation())
