"""Nets and losses that write into what they are given, loaders that fill the same memory again: against a plain loop
that copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metahpo.errors import NetError
from metahpo.functional import FunctionalModule
from metahpo.functional.lending import Lent
from metahpo.hypergrad import CG, PES, FiniteDifference, Forward, Implicit, Unroll
from metahpo.inner import SGD, InnerProblem, Mixed, Sqrt
from metahpo.learners import MAML, Phase
from metahpo.tasks import Task
from metahpo.training.engines import Loop, Threads, Trace, VMap

STRATEGIES = {
    "unroll": Unroll(),
    "mixed, again": Unroll(Mixed(), Sqrt()),
    "forward": Forward(),
    "difference": FiniteDifference(),
    "implicit": Implicit(CG(damping=0.1)),
    "pes": PES(2, 0.1),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """In place: with its input halved and moved where it stands."""

    def __init__(self, in_place: bool):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.in_place = nn.Linear(3, 2).double(), in_place

    def forward(self, x):
        return self.layer(x.sub_(0.5).mul_(0.5) if self.in_place else 0.5 * (x - 0.5))


@pytest.mark.parametrize("engine", [Loop(), Threads(), VMap(), Trace()], ids=lambda engine: engine.name)
def test_a_net_that_writes_into_its_input_learns_as_one_that_does_not(engine):
    tasks = Task(draw(2, 4, 3), draw(2, 4, 2, seed=1), draw(2, 4, 3, seed=2), draw(2, 4, 2, seed=3))
    kept = [part.clone() for part in tasks]
    learners = [MAML(Net(in_place), steps=2, loss=F.mse_loss).double() for in_place in (False, True)]
    for _ in range(3):
        right, found = (engine.meta_gradient(learner, tasks, Phase(training=True)).grads for learner in learners)
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(part, before) for part, before in zip(tasks, kept))


def hypergradient(strategy, loss, batches):
    def outer_loss(params, hparams):
        return (draw(5, 3, seed=7) @ params["w"] - 1).square().mean()

    hparams = {"decay": torch.tensor(-2.0, dtype=torch.float64)}
    return strategy(InnerProblem(loss), SGD(0.125).double(), outer_loss, {"w": draw(3, seed=8)}, hparams, batches)


def plain(params, hparams, batch):
    x, y = batch["x"], batch["y"]
    return (0.5 * (x - 0.5) @ params["w"] - y).square().mean() + hparams["decay"].exp() * params["w"].square().sum()


def takes_apart(params, hparams, batch):
    x, y = batch.pop("x"), batch.pop("y")
    return plain(params, hparams, {"x": x, "y": y})


def writes(params, hparams, batch):
    batch["x"].sub_(0.5).mul_(0.5)
    return plain(params, hparams, {"x": 2 * batch["x"] + 0.5, "y": batch["y"]})


def writes_data(params, hparams, batch):
    batch["x"].data.sub_(0.5)
    return plain(params, hparams, {"x": batch["x"] + 0.5, "y": batch["y"]})


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("loss", [takes_apart, writes, writes_data])
def test_a_loss_may_write_into_its_batch_and_take_it_apart(strategy, loss):
    if loss is writes_data and strategy == "pes":
        pytest.skip("under vmap no number is looked at")
    batches = [{"x": draw(6, 3, seed=i), "y": draw(6, seed=9 + i)} for i in (0, 1, 0)]
    right, found = (hypergradient(STRATEGIES[strategy], each, batches) for each in (plain, loss))
    torch.testing.assert_close(found.grads, right.grads, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found.losses, right.losses, rtol=1e-10, atol=0)
    assert torch.equal(batches[0]["x"], draw(6, 3))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loader_may_fill_the_same_memory_again(strategy):
    def loader():
        x = np.empty((6, 3))
        for i in range(3):
            x[:] = draw(6, 3, seed=i).numpy()
            yield {"x": torch.from_numpy(x), "y": draw(6, seed=9)}

    batches = [{"x": draw(6, 3, seed=i), "y": draw(6, seed=9)} for i in range(3)]
    right = hypergradient(STRATEGIES[strategy], plain, batches)
    found = hypergradient(STRATEGIES[strategy], plain, loader())
    torch.testing.assert_close(found.grads, right.grads, rtol=1e-12, atol=0)


def test_a_write_at_a_later_call_alone_is_refused():
    calls = []

    def function(x):
        calls.append(x)
        return x.mul_(2) if len(calls) == 4 else x + 0

    lent, x = Lent(function, 0, "the loss"), torch.ones(2)
    for _ in range(3):
        lent(x)
    with pytest.raises(NetError, match=r"the loss wrote into the data .* not at its first calls"):
        lent(x)
    # After the first calls what does not write gets the tensor itself.
    assert [given is x for given in calls] == [False, False, True, True]


def test_a_net_gets_its_input_itself_once_it_is_known_not_to_write():
    seen = []

    class Kept(nn.Linear):
        def forward(self, x):
            seen.append(x.data_ptr())
            return super().forward(x)

    module, x = FunctionalModule(Kept(3, 2)), torch.ones(4, 3)
    for _ in range(4):
        module(module.params(), x)
    assert [place == x.data_ptr() for place in seen] == [False, False, True, True]
