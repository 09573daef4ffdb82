"""Environments of gymnasium: their tasks, and those that are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from metahpo.errors import ConfigError, NetError
from metahpo.learners import Phase, PolicyMAML
from metahpo.nets import MLP
from metahpo.rl import Gym, HalfCheetahDirection, HalfCheetahVelocity, roll_out
from metahpo.tasks import RolloutTasks
from metahpo.training.engines import Loop, Threads, VMap

gymnasium = pytest.importorskip("gymnasium")
spaces = gymnasium.spaces

VARY = {"m": (0.5, 1.5), "l": (0.5, 1.5), "g": (5.0, 15.0)}


@pytest.fixture(scope="module")
def pendulum() -> Gym:
    return Gym("Pendulum-v1", VARY)


def made(environment: Gym) -> PolicyMAML:
    torch.manual_seed(0)
    net = MLP([environment.observation_size], environment.action_size, hidden=[8])
    return PolicyMAML(net, environment)


def test_an_episode_is_gymnasiums_with_the_tasks_numbers(pendulum):
    task = RolloutTasks(pendulum, episodes=2, horizon=20).task(3)
    plan = torch.zeros(2, 1), torch.zeros(1)
    found = roll_out(pendulum, lambda _: plan, task.support_x, task.support_y)
    own = gymnasium.make("Pendulum-v1")
    for e in range(2):
        *numbers, seed = task.support_y[e].tolist()
        for (name, (low, high)), value in zip(VARY.items(), numbers):
            assert low <= value <= high
            setattr(own.unwrapped, name, value)
        seen, _ = own.reset(seed=int(seed))
        for t in range(20):
            np.testing.assert_allclose(found.observations[e, t], seen, rtol=1e-5, atol=1e-5)
            torque = 2 * np.clip(task.support_x[e, t].double().numpy(), -1, 1)
            seen, reward, *_ = own.step(torque.astype(np.float32))
            assert found.rewards[e, t].item() == pytest.approx(reward, rel=1e-5)
    assert torch.equal(task.support_y[0, :3], task.query_y[1, :3])
    assert len({*task.support_y[:, 3].tolist(), *task.query_y[:, 3].tolist()}) == 4
    assert not torch.equal(task.support_y[0, :3], RolloutTasks(pendulum).task(4).support_y[0, :3])


def test_a_task_gives_the_same_again_on_every_engine_that_can(pendulum):
    learner, tasks = made(pendulum), RolloutTasks(pendulum, episodes=2, horizon=8).batch(range(3))
    phase = learner.training_phase(0)
    first = Loop().meta_gradient(learner, tasks, phase)
    torch.testing.assert_close(Loop().meta_gradient(learner, tasks, phase), first, rtol=0, atol=0)
    again = made(Gym("Pendulum-v1", VARY))
    torch.testing.assert_close(Loop().meta_gradient(again, tasks, phase), first, rtol=0, atol=0)
    torch.testing.assert_close(Threads().meta_gradient(learner, tasks, phase), first)
    metrics, _ = Loop().evaluate(learner, tasks, Phase())
    assert metrics["return"].isfinite().all() and (metrics["return"] < 0).all()
    with pytest.raises(NetError, match=r"environment Pendulum-v1 is stepped in Python.* choose training.engine loop"):
        VMap().meta_gradient(learner, tasks, phase)


class Odd(gymnasium.Env):
    """An environment of any spaces."""

    def __init__(self, action, observation):
        self.action_space, self.observation_space = action, observation


BOX, VECTOR = spaces.Box(-1, 1, (1,)), spaces.Box(-np.inf, np.inf, (2,))
ODD = {
    "Discrete": (spaces.Discrete(2), VECTOR, r"its action space is Discrete\(2\)"),
    "Unbounded": (spaces.Box(-np.inf, np.inf, (1,)), VECTOR, "its action space is Box"),
    "Whole": (spaces.Box(0, 4, (2,), dtype=np.int64), VECTOR, "its action space is Box"),
    "Square": (spaces.Box(-1, 1, (2, 2)), VECTOR, "its action space is Box"),
    "Dict": (BOX, spaces.Dict({"a": VECTOR}), "its observation space is Dict"),
    "Image": (BOX, spaces.Box(0, 255, (8, 8, 3), dtype=np.uint8), "its observation space is Box"),
}
for kind, (action, observation, _) in ODD.items():
    gymnasium.register(f"{kind}-v0", lambda action=action, observation=observation: Odd(action, observation))


@pytest.mark.parametrize("kind", ODD)
def test_spaces_that_the_policy_cannot_take_are_refused_by_name(kind):
    with pytest.raises(NetError, match=f"environment {kind}-v0: {ODD[kind][2]}.*, expected a Box of one dimension"):
        Gym(f"{kind}-v0")


@pytest.mark.parametrize(
    ("name", "vary", "expected"),
    [
        ("Nope-v1", {}, "gymnasium cannot make environment 'Nope-v1'"),
        ("Pendulum-v1", {"mass": (1, 2)}, "data.vary.mass: .* Pendulum-v1, which has no attribute of that name"),
        ("Pendulum-v1", {"action_space": (1, 2)}, "data.vary.action_space: .* which has 'Box"),
        ("Pendulum-v1", {"unwrapped": (1, 2)}, "data.vary.unwrapped: "),
        # Read as the environment is made: of the drawing alone, or of the actions' bounds.
        ("Pendulum-v1", {"screen_dim": (300, 900)}, "data.vary.screen_dim: 300 and 450 give .* the same episode"),
        ("Pendulum-v1", {"m": (1, 2), "max_torque": (1, 6)}, "data.vary.max_torque: 2.25 and 3.5 give .* the same"),
    ],
)
def test_what_cannot_be_varied_is_refused(name, vary, expected):
    with pytest.raises(ConfigError, match=expected):
        Gym(name, vary)


@pytest.mark.parametrize("kind", [HalfCheetahVelocity, HalfCheetahDirection])
def test_half_cheetah_is_rewarded_for_the_tasks_velocity(kind):
    pytest.importorskip("mujoco")
    pytest.importorskip("imageio", reason="gymnasium[mujoco] is not installed")
    environment = kind()
    tasks = RolloutTasks(environment, episodes=1, horizon=5).batch(range(20))
    goals = tasks.support_y[:, 0, 0]
    if kind is HalfCheetahDirection:
        assert set(goals.tolist()) == {-1.0, 1.0}
    else:
        assert 0 <= goals.min() < 0.5 and 1.5 < goals.max() <= 2
    task = tasks.select(0)
    silent = torch.zeros(1, 6), torch.zeros(6)
    found = roll_out(environment, lambda _: silent, task.support_x, task.support_y)
    own = gymnasium.make("HalfCheetah-v5")
    own.reset(seed=int(task.support_y[0, 1]))
    for t in range(5):
        action = task.support_x[0, t].clamp(-1, 1).numpy()
        start = own.unwrapped.data.qpos[0]
        own.step(action)
        velocity = (own.unwrapped.data.qpos[0] - start) / own.unwrapped.dt
        goal = goals[0].item()
        forward = -abs(velocity - goal) if kind is HalfCheetahVelocity else goal * velocity
        assert found.rewards[0, t].item() == pytest.approx(forward - 0.05 * (action**2).sum(), rel=1e-3)
