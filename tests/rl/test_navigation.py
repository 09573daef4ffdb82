"""Navigation's dynamics and best return, rollouts, advantages, and the numbered tasks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from metahpo.learners import PolicyMAML
from metahpo.nets import MLP
from metahpo.rl import GaussianPolicy, Navigation, Rollout, advantages, best_return, log_prob, roll_out
from metahpo.rl.advantages import RIDGE, discounted_sums, features, linear_baseline
from metahpo.tasks import RolloutTasks


def returns_of(plan: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """The return of each plan [E, H, 2] on the way to ``goal``, by rolling out actions that are all noise."""
    silent = (torch.zeros_like(plan[:, 0]), torch.zeros(2, dtype=plan.dtype))
    return roll_out(Navigation(), lambda _: silent, plan, goal.expand(len(plan), 2)).returns()


def test_no_plan_beats_the_best_return_and_one_reaches_it():
    values = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0], dtype=torch.float64)
    actions = torch.cartesian_prod(values, values)
    plans = actions[torch.tensor(list(itertools.product(range(25), repeat=3)))]
    goal = torch.tensor(
        [0.25, -0.1], dtype=torch.float64
    )  # Straight there is one of the plans: 1, 1, 1/2 and -1, 0, 0.
    found, best = returns_of(plans, goal), best_return(goal, 3)
    torch.testing.assert_close(found.max(), best)
    torch.testing.assert_close(best, torch.tensor(-(0.15**2 + 0.05**2), dtype=torch.float64))


def test_an_episode_ends_at_the_goal_and_actions_are_clipped():
    goal = torch.tensor([[0.2, 0.0]])
    plan = torch.tensor([[[5.0, 0.0], [1.0, 0.05], [9.0, 9.0], [9.0, 9.0]]])
    silent = (torch.zeros(1, 2), torch.zeros(2))
    found = roll_out(Navigation(), lambda _: silent, plan, goal)
    torch.testing.assert_close(found.taken, torch.tensor([[1.0, 1, 0, 0]]))
    torch.testing.assert_close(found.rewards, torch.tensor([[-0.01, -(0.005**2), 0, 0]]))
    torch.testing.assert_close(found.observations[0, :2], torch.tensor([[0.0, 0], [0.1, 0]]))


def test_tasks_are_pure_functions_of_their_number():
    source = RolloutTasks(Navigation(), "val", episodes=3, horizon=4, seed=5)
    batch = source.batch([7, 2])
    for mine, again in zip(source.task(2), batch.select(1)):
        assert torch.equal(mine, again)
    assert batch.support_x.shape == (2, 3, 4, 2)
    assert batch.query_y.shape == (2, 3, 2)
    assert torch.equal(batch.support_y, batch.query_y)
    assert not torch.equal(batch.support_x, batch.query_x)
    others = [RolloutTasks(Navigation(), "test", seed=5), RolloutTasks(Navigation(), "val", seed=6)]
    assert all(not torch.equal(other.task(2).support_y[0], batch.support_y[1, 0]) for other in others)
    goals = RolloutTasks(Navigation(), "val", horizon=2, seed=5).batch(range(200)).support_y
    assert torch.equal(goals[7, 0], batch.support_y[0, 0])
    assert goals.abs().max() <= 0.5
    assert abs(goals[:, 0].square().mean() - 1 / 12) < 0.01


def random_rollout(ended: bool = True) -> Rollout:
    generator = torch.Generator().manual_seed(0)
    seen, actions = (torch.randn(4, 6, n, generator=generator, dtype=torch.float64) for n in (2, 3))
    taken = torch.ones(4, 6, dtype=torch.float64)
    if ended:
        taken[1, 3:] = taken[2, 1:] = 0
    rewards = torch.randn(4, 6, generator=generator, dtype=torch.float64) * taken
    return Rollout(seen, actions, rewards, taken)


def test_the_baseline_is_the_ridge_regression_of_numpy():
    rollout = random_rollout()
    targets = torch.randn(4, 6, dtype=torch.float64)
    kept = rollout.taken.numpy() > 0
    x, y = features(rollout).numpy()[kept], targets.numpy()[kept]
    x = np.concatenate([x, np.sqrt(RIDGE) * np.eye(x.shape[1])])
    weights = np.linalg.lstsq(x, np.concatenate([y, np.zeros(x.shape[1])]), rcond=None)[0]
    found = linear_baseline(rollout, targets).numpy()[kept]
    np.testing.assert_allclose(found, features(rollout).numpy()[kept] @ weights, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("gae", [1.0, 0.9, 0.0])
def test_advantages_are_those_of_a_plain_loop(gae):
    rollout, discount, rows = random_rollout(), 0.8, []
    sums = torch.zeros(4, 6, dtype=torch.float64)
    for e, t in itertools.product(range(4), range(6)):
        sums[e, t] = sum(discount ** (k - t) * rollout.rewards[e, k] for k in range(t, 6))
    values = linear_baseline(rollout, sums)
    for e in range(4):
        length, ahead, row = int(rollout.taken[e].sum()), 0.0, []
        for t in reversed(range(length)):
            following = values[e, t + 1] if t + 1 < length else 0.0
            ahead = rollout.rewards[e, t] + discount * following - values[e, t] + discount * gae * ahead
            row.insert(0, ahead)
        rows.append(torch.stack(row))
    every = torch.cat(rows)
    found = advantages(rollout, discount, gae)
    torch.testing.assert_close(found[rollout.taken > 0], (every - every.mean()) / every.std(correction=0))
    assert found[rollout.taken == 0].abs().max() == 0


def test_log_prob_is_that_of_torch_distributions():
    policy = GaussianPolicy(torch.nn.Linear(3, 2), 2, initial_std=0.3)
    mean, log_std = policy(torch.randn(5, 3))
    actions = torch.randn(5, 2)
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(-1)
    torch.testing.assert_close(log_prob(actions, mean, log_std), expected)


class Undefined(Navigation):
    """Gives NaN after an episode's end, which comes after 2 steps or 3."""

    def reset(self, parameters):
        state, seen = super().reset(parameters)
        return (state, torch.arange(len(seen)) % 2, 0), seen

    def step(self, state, actions, parameters):
        inner, longer, count = state
        step = super().step(inner, actions, parameters)
        over, nan = count > 1 + longer, float("nan")
        return step._replace(
            state=(step.state, longer, count + 1),
            observations=torch.where(over[:, None] | (count == 1 + longer)[:, None], nan, step.observations),
            rewards=torch.where(over, nan, step.rewards),
            done=count == 1 + longer,
        )


def test_what_comes_after_an_episodes_end_is_not_looked_at():
    torch.manual_seed(0)
    learner = PolicyMAML(MLP([2], 2, hidden=[4]), Undefined(), steps=1).double()
    noise, parameters = torch.randn(4, 5, 2, dtype=torch.float64), 3 * torch.ones(4, 2, dtype=torch.float64)
    params = dict(learner.module.params())
    whole = learner.roll_out(params, noise, parameters)
    assert whole.taken.sum(1).tolist() == [2, 3, 2, 3]
    # The sum over the steps taken alone, episode by episode.
    found = learner.surrogate(params, whole)
    weights, terms = advantages(whole, learner.discount, learner.gae), []
    for e, t in itertools.product(range(4), range(3)):
        if whole.taken[e, t]:
            mean, log_std = learner._policy(params, whole.observations[e, t][None])
            terms.append(log_prob(whole.actions[e, t][None], mean, log_std)[0] * weights[e, t])
    torch.testing.assert_close(found, -sum(terms) / 10)
    assert all(g.isfinite().all() for g in torch.autograd.grad(found, list(params.values())))


def test_discounts_are_not_rounded_to_float32():
    rewards = torch.ones(1, 50, dtype=torch.float64)
    found = discounted_sums(rewards, 0.999)[0, 0]
    assert float(found) == pytest.approx((1 - 0.999**50) / (1 - 0.999), rel=1e-13)
