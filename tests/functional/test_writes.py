"""Nets that write into their own weights are refused, and nothing is written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metahpo.errors import NetError
from metahpo.functional import FunctionalModule
from metahpo.learners import MAML, Phase
from metahpo.tasks import Task
from metahpo.training.engines import Loop, Threads, VMap


class Average(nn.Module):
    """A second layer follows the first: by way of ``.data``, a view, or in place under no_grad."""

    def __init__(self, way: str):
        super().__init__()
        self.fast, self.slow, self.way = nn.Linear(3, 3), nn.Linear(3, 3), way
        self.slow.requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            if self.way == "data":
                self.slow.weight.data.lerp_(self.fast.weight, 0.1)
            elif self.way == "view":
                self.slow.weight[0] = self.fast.weight[0]
            else:
                self.fast.weight.clamp_(-0.1, 0.1)
        return self.fast(x) + self.slow(x)


class Words(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(4, 3, **options), nn.Linear(3, 3)
        nn.init.constant_(self.embedding.weight, 5.0)

    def forward(self, x):
        return self.linear(self.embedding(x.abs().long().clamp(max=3)).mean(1))


NETS = {
    "slow.weight": [lambda: Average("data"), lambda: Average("view")],
    "fast.weight": [lambda: Average("clamp")],
    "embedding.weight": [lambda: Words(max_norm=1.0)],
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("engine", [Loop, Threads, VMap])
@pytest.mark.parametrize(("name", "make"), [(name, make) for name, makes in NETS.items() for make in makes])
def test_a_write_into_a_weight_is_refused_by_name_before_it_is_done(name, make, engine):
    learner = MAML(make(), steps=1)
    tasks = Task(torch.randn(2, 4, 3), torch.arange(4).repeat(2, 1) % 3, torch.randn(2, 4, 3), torch.zeros(2, 4).long())
    # torch itself refuses some of these under vmap, in words of its own.
    message = "cannot run|writes into" if engine is VMap else f"writes into its parameter '{name}' when it runs"
    before = {n: t.clone() for n, t in learner.state_dict().items()}
    for call, phase in (("meta_gradient", Phase(training=True)), ("evaluate", Phase())):
        with pytest.raises(NetError, match=message):
            getattr(engine(), call)(learner, tasks, phase)
        torch.testing.assert_close(learner.state_dict(), before, rtol=0, atol=0)


def test_a_buffer_that_was_none_is_named():
    class Cached(nn.Linear):
        def forward(self, x):
            self.cache = x.detach()
            return super().forward(x)

    net = nn.Sequential(Cached(3, 3))
    net[0].register_buffer("cache", None)
    module = FunctionalModule(net)
    with pytest.raises(NetError, match=r"fills its buffer '0\.cache', which was None"):
        module(module.params(), torch.randn(2, 3))
    assert module.net[0].cache is None


def test_a_net_that_writes_elsewhere_runs():
    module = FunctionalModule(nn.Sequential(Words(), nn.ReLU(inplace=True)))
    assert module(module.params(), torch.randn(2, 3)).shape == (2, 3)


class Late(nn.Linear):
    """Clamps its weight from a call on."""

    def __init__(self, calls):
        super().__init__(3, 3)
        self.left = [calls]

    def forward(self, x):
        self.left[0] -= 1
        if self.left[0] < 0:
            with torch.no_grad():
                self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("engine", [Loop, VMap])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_write_that_begins_after_many_calls_is_refused_by_name(engine, frozen):
    net = nn.Sequential(nn.Linear(3, 3), Late(20))
    net[1].weight.requires_grad_(not frozen)
    learner, engine = MAML(net, steps=1), engine()
    tasks = Task(*(torch.randn(2, 4, 3) if i % 2 == 0 else torch.arange(4).repeat(2, 1) % 3 for i in range(4)))
    message = r"wrote into its parameter '1\.weight'" if engine.name == "loop" else "cannot run|wrote into"
    with pytest.raises(NetError, match=message):
        for _ in range(20):
            engine.meta_gradient(learner, tasks, Phase(training=True))
    # At once; after it vmap has loop try the first task.
    assert learner.module.net[1].left[0] >= -2
