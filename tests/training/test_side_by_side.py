"""Trainings in several threads of one process, and learners that are used while they are trained."""

from __future__ import annotations

import copy
import multiprocessing
import threading
import time

import pytest
import torch
from torch import nn

from metahpo.functional.turns import TURN, Turn
from metahpo.inner import NoRemat, Sqrt
from metahpo.learners import IMAML, MAML, MAMLPlusPlus, MetaLearner, Phase, ProtoNet
from metahpo.tasks import Task
from metahpo.training import Trainer, TrainingSettings
from metahpo.training.engines import Threads
from metahpo.training.environment import intra_op_threads
from metahpo.training.evaluation import evaluate

SETTINGS = {"epochs": 1, "iterations": 3, "tasks": 2, "val_tasks": 2, "test_tasks": 2, "check_gradient": False}
LEARNERS = {
    "maml": lambda net: MAML(net, steps=2),
    "maml_pp": lambda net: MAMLPlusPlus(net, steps=2, remat=NoRemat()),
    "remat": lambda net: MAML(net, steps=2, remat=Sqrt()),
    "imaml": lambda net: IMAML(net, steps=2),
    "proto_net": lambda net: ProtoNet(net, ways=3),
}


@pytest.fixture(autouse=True)
def _one_thread():
    """A sum is the same to the last bit in every thread of Python's if torch computes it with one of its own."""
    with intra_op_threads(1):
        yield


class Blobs:
    def task(self, index: int) -> Task:
        generator = torch.Generator().manual_seed(index)
        y = torch.arange(3).repeat(4)
        x = torch.randn(12, 4, generator=generator) + y[:, None]
        return Task(x[:6], y[:6], x[6:], y[6:])

    def batch(self, indices) -> Task:
        return Task(*(torch.stack(parts) for parts in zip(*(self.task(i) for i in indices))))


def made(kind: str, engine: str, dropout: float, seed: int = 0) -> Trainer:
    with TURN, torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3))
        learner = LEARNERS[kind](net)
    return Trainer(learner, Blobs(), Blobs(), TrainingSettings(**SETTINGS, engine=engine, seed=seed))


def assert_same(found: Trainer, wanted: Trainer) -> None:
    assert found.history == wanted.history
    for name, value in wanted.learner.state_dict().items():
        assert torch.equal(found.learner.state_dict()[name], value), name


def together(*calls) -> None:
    """Runs the calls in a thread each; what one raises is raised."""
    errors: list[Exception] = []

    def run(call) -> None:
        try:
            call()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _then(done: threading.Event, call) -> None:
    try:
        call()
    finally:
        done.set()


@pytest.mark.parametrize(
    ("kind", "engines", "dropout"),
    [
        ("maml_pp", ("loop", "vmap"), 0.3),
        ("remat", ("loop", "loop"), 0.3),
        ("imaml", ("loop", "loop"), 0.3),
        ("maml", ("threads", "threads"), 0.0),
    ],
)
def test_two_trainings_at_once_are_those_of_each_alone(kind, engines, dropout):
    alone = [made(kind, engine, dropout, seed) for seed, engine in enumerate(engines)]
    for trainer in alone:
        trainer.fit()
    beside = [made(kind, engine, dropout, seed) for seed, engine in enumerate(engines)]
    together(*(trainer.fit for trainer in beside))
    for found, wanted in zip(beside, alone):
        assert_same(found, wanted)


USES = {
    "evaluate": lambda learner, task: evaluate(learner, Blobs(), 2, TrainingSettings(**SETTINGS, engine="loop")),
    "outputs": lambda learner, task: learner.outputs(task, Phase()),
    "meta_loss": lambda learner, task: learner.meta_loss(task, Phase(training=True)),
    "state": lambda learner, task: copy.deepcopy(learner.state_dict()),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("kind", "engine"), [("maml_pp", "loop"), ("proto_net", "vmap"), ("maml", "threads")])
def test_a_learner_that_is_used_while_it_is_trained_trains_as_if_it_were_not(kind, engine, use):
    alone, beside = made(kind, engine, 0.0), made(kind, engine, 0.0)
    alone.fit()
    uses, done = 0, threading.Event()

    def look() -> None:
        nonlocal uses
        while not (uses and done.is_set()):
            USES[use](beside.learner, Blobs().task(0))
            uses += 1
            time.sleep(0.002)

    together(look, lambda: _then(done, beside.fit))
    assert_same(beside, alone)


def test_engine_threads_is_not_stopped_by_what_another_thread_draws():
    alone, beside = made("maml", "threads", 0.0), made("maml", "threads", 0.0)
    alone.fit()

    done = threading.Event()

    def draw() -> None:
        while not done.is_set():
            torch.rand(2)
            time.sleep(0.0005)

    together(draw, lambda: _then(done, beside.fit))
    assert_same(beside, alone)


def test_a_turn_goes_to_who_waits_and_its_holder_may_take_it_again():
    turn, order = Turn(), []

    def take(name: str) -> None:
        with turn, turn:
            order.append(name)

    with turn:
        waiting = threading.Thread(target=take, args=("other",))
        waiting.start()
        while not turn._next.locked():
            time.sleep(0.001)
        take("own")
    take("own")
    waiting.join()
    assert order == ["own", "other", "own"]


def test_a_fork_waits_for_its_turn_and_leaves_the_child_a_free_one():
    held, context = threading.Event(), multiprocessing.get_context("fork")

    def hold() -> None:
        with TURN:
            held.set()
            time.sleep(0.05)

    def run() -> None:
        together(lambda: made("maml", "loop", 0.0).evaluate(Blobs(), 2))

    threading.Thread(target=hold).start()
    held.wait()
    process = context.Process(target=run)
    process.start()
    assert TURN._holder is None
    process.join(60)
    process.kill()
    assert process.exitcode == 0


def test_learners_of_users_take_turns():
    class Own(MetaLearner):
        def adapt(self, support_x, support_y, phase):
            return TURN._holder

    assert Own().adapt(None, None, None) == threading.get_ident()
    assert TURN._holder is None


def test_once_engine_threads_has_raised_none_of_its_threads_is_at_work():
    at_work, another = [], threading.Event()

    def loss(outputs, targets):
        if float(targets[0]) == 0:
            another.wait(60)
            raise ValueError("the first task fails")
        at_work.append(1)
        another.set()
        time.sleep(0.05)
        at_work.pop()
        return outputs.square().mean()

    batch = Blobs().batch(range(3))
    batch = batch._replace(support_y=torch.arange(3.0)[:, None].expand(3, 6), query_y=torch.ones(3, 6))
    with intra_op_threads(2), pytest.raises(ValueError, match="the first task fails"):
        Threads().meta_gradient(MAML(nn.Linear(4, 3), steps=1, loss=loss), batch, Phase(training=True))
    assert not at_work
