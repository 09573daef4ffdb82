from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from metahpo.errors import NetError
from metahpo.functional import FunctionalModule
from metahpo.functional.copies import copied, trainable
from metahpo.learners import CAVIA, MAML, LinearHead, Phase, ProtoNet, WarpMAML
from metahpo.tasks import Task
from metahpo.training.engines import Loop, Threads, VMap
from metahpo.tuning import tune_rates


class Attending(nn.Module):
    """Keeps what it computed last, in an attribute and deeper."""

    def __init__(self):
        super().__init__()
        self.score, self.head, self.last = nn.Linear(3, 3), nn.Linear(3, 2), {}

    def forward(self, x):
        self.attention = self.score(x).softmax(-1)
        self.last["weights"] = [self.attention]
        return self.head(x * self.attention)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def old_weight_norm() -> nn.Module:
    found = net()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(found[0])
    return found


def pruned() -> nn.Module:
    found = net()
    prune.l1_unstructured(found[0], "weight", 0.5)
    return found


def recurrent() -> nn.Module:
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.rnn(x[:, None])[0][:, -1])

    return Recurrent()


def tasks() -> Task:
    x, y = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)), torch.arange(2).repeat(2, 2)
    return Task(x, y, x.flip(1), y.flip(1))


@pytest.mark.parametrize("make", [Attending, old_weight_norm, pruned, recurrent])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_nets_that_keep_what_they_computed_run_everywhere_and_alike(make):
    made = make()
    made(torch.randn(4, 3))  # As a user who tried it.
    learner = MAML(made, steps=2)
    phase, grads = Phase(training=True), []
    others = [] if make is recurrent else [VMap()]  # torch.func refuses recurrent layers.
    for engine in (Loop(), Threads(), *others, Threads()):
        grads.append(engine.meta_gradient(learner, tasks(), phase).grads)
    for other in grads[1:]:
        for name, grad in grads[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-3, atol=1e-5)
    task = tasks().select(0)
    fitted = learner.fitted(task.support_x, task.support_y)
    adapted = learner.adapt(task.support_x, task.support_y, Phase())
    torch.testing.assert_close(fitted(task.query_x), learner.predict(adapted, task.query_x))


WRAPPERS = {
    "data parallel": nn.DataParallel,
    "compiled": torch.compile,
    "both": lambda net: nn.DataParallel(torch.compile(net)),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("inside", [False, True])
def test_wrappers_are_taken_off(wrap, inside):
    plain, wrapped = net(), net()
    if inside:
        wrapped[2] = WRAPPERS[wrap](wrapped[2])
    else:
        wrapped = WRAPPERS[wrap](wrapped)
    kinds = (MAML, CAVIA, WarpMAML, lambda n: ProtoNet(n, 2), lambda n: LinearHead(n, 2, 2))
    for kind in kinds:
        grads = []
        for each in (plain, wrapped):
            torch.manual_seed(1)
            grads.append(Loop().meta_gradient(kind(each), tasks(), Phase(training=True)).grads)
        assert list(grads[0]) == list(grads[1])
        for name, grad in grads[0].items():
            torch.testing.assert_close(grads[1][name], grad)
    names = trainable(wrapped)
    assert list(names) == [name for name, _ in plain.named_parameters()]
    assert {id(p) for p in names.values()} == {id(p) for p in wrapped.parameters()}, "the net's own"


def test_distributed_wrappers_are_taken_off(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net())
        assert isinstance(FunctionalModule(wrapped).net, nn.Sequential)
    finally:
        torch.distributed.destroy_process_group()


def test_rates_tuned_for_a_wrapped_net_fit_it():
    wrapped = nn.DataParallel(net())
    x, y = tasks().select(0)[:2]
    rates = tune_rates(wrapped, F.cross_entropy, [(x, y)] * 2, [(x, y)], steps=2, phases=1, iterations=1)
    groups = rates.param_groups(wrapped)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in wrapped.parameters()}


def test_what_cannot_be_copied_is_said():
    held = net()
    held.lock = threading.Lock()
    with pytest.raises(NetError, match=r"Sequential cannot be copied: cannot pickle '_thread.lock' object"):
        copied(held)
