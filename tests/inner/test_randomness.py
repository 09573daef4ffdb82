"""What is computed again draws the same random numbers, or says that it cannot."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from metahpo.errors import NetError
from metahpo.functional.levels import levels
from metahpo.inner import Every, Mixed, NoRemat, Reverse, Sqrt
from metahpo.learners import IMAML, MAML, Phase
from metahpo.tasks import Task
from metahpo.training.engines import Loop, VMap


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (1 + 0.05 * self.calls)


def net(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), layer, nn.Linear(5, 3))


def tasks(count: int = 2) -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 6, 4, generator=generator, dtype=torch.float64)
    y = torch.arange(3).repeat(count, 2)
    return Task(x, y, x.flip(1), y)


def gradient(layer, engine=Loop, kind=MAML, **options) -> torch.Tensor:
    learner = kind(net(layer), inner_lr=0.5, **options).double()
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(3)
    grads = engine().meta_gradient(learner, tasks(), Phase(training=True)).grads
    return torch.cat([g.flatten() for g in grads.values()])


DRAWS = {
    "torch": lambda x: nn.functional.dropout(x, 0.5),
    "random": lambda x: x * (0.5 + random.random()),
    "numpy": lambda x: x * (0.5 + np.random.rand()),
}
WAYS = {
    "every": {"remat": Every(2)},
    "mixed": {"gradient": Mixed()},
    "mixed by func": {"gradient": Mixed("func")},
    "both": {"gradient": Mixed(), "remat": Sqrt()},
}


@pytest.mark.parametrize("engine", [Loop, VMap])
@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_computed_again_draws_the_same(engine, draws, way):
    layer = Applied(DRAWS[draws])
    wanted = gradient(layer, engine, steps=3, gradient=Reverse(), remat=NoRemat())
    after = random.random(), np.random.rand(), torch.rand(())
    torch.testing.assert_close(gradient(layer, engine, steps=3, **WAYS[way]), wanted, rtol=1e-10, atol=1e-10)
    assert (random.random(), np.random.rand(), torch.rand(())) == after, "the generators are as if it had run once"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer", [Counting(), Applied(lambda x, own=random.Random(0): x * own.random())])
def test_a_loss_that_is_another_when_computed_again_is_refused(layer, way):
    with pytest.raises(NetError, match=r"the inner loss of step 0 is .* computed again, and was .*choose Reverse\(\)"):
        gradient(layer, steps=2, **WAYS[way])


@pytest.mark.parametrize("engine", [Loop, VMap])
def test_all_products_of_imaml_see_one_mask(engine):
    drawn = set()

    def noisy(x):
        mask = torch.rand((), dtype=x.dtype)
        *_, value = levels(mask)
        drawn.add(str(value.detach().flatten().tolist()))
        return x * (0.5 + mask)

    learner = IMAML(net(Applied(noisy)), steps=4, cg_steps=5).double()
    engine().meta_gradient(learner, Task(*(t[:1] for t in tasks())), Phase(training=True))
    assert len(drawn) == 4 + 1 + 1, "one a step, one for the Hessian, one for the query set"
