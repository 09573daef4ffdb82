"""The outer optimizer against a plain training loop: what it moves, what it leaves alone, and what it knows again."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metahpo.errors import CheckpointError
from metahpo.functional import FunctionalModule
from metahpo.learners import MAML, Adapted, Improvements, MetaLearner, ProtoNet
from metahpo.tasks import Task
from metahpo.training import Trainer, TrainingSettings
from metahpo.training.checkpoint import CheckpointStore
from metahpo.training.engines import Loop, Threads, Trace, VMap

SETTINGS = {
    "epochs": 3,
    "iterations": 2,
    "tasks": 2,
    "val_tasks": 2,
    "optimizer": "AdamW",
    "optimizer_args": {"weight_decay": 0.1},
    "lr": 0.125,
    "engine": "loop",
    "check_gradient": False,
}


class Points:
    """Numbered tasks of three classes; the parity of a task's number stands in its first input."""

    def task(self, index: int) -> Task:
        x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        x[:, :, 0] = index // 2 % 2
        y = torch.arange(3).repeat(2)
        return Task(x[0], y, x[1], y)

    def batch(self, indices) -> Task:
        return Task(*(torch.stack(parts) for parts in zip(*map(self.task, indices))))


class Supervised(MetaLearner):
    """Ordinary training on the query set."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.module = FunctionalModule(net)

    def adapt(self, support_x, support_y, phase):
        return Adapted({}, phase, self.module.buffers_by_name())

    def predict(self, adapted, x):
        return self.module.apply_with({}, adapted.buffers, x, training=adapted.phase.training)[0]


class Routed(nn.Module):
    """One of two layers, as the first input says; a third that is never used, and a parameter without entries."""

    def __init__(self, order=("even", "odd", "never", "head")):
        super().__init__()
        made = {name: nn.Linear(4 if name != "head" else 3, 3) for name in ("even", "odd", "never", "head")}
        for name in order:
            self.add_module(name, made[name])
        self.empty = nn.Parameter(torch.zeros(0))

    def forward(self, x):
        return self.head(torch.tanh((self.odd if bool(x[0, 0]) else self.even)(x)))


def routed(*order) -> nn.Module:
    torch.manual_seed(0)
    return Routed(*order).double()


def plain(net: nn.Module, free_from: int = 0) -> nn.Module:
    """AdamW over the batches; ``net.head`` is frozen up to step ``free_from``."""
    net = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), 0.125, weight_decay=0.1)
    for step in range(SETTINGS["epochs"] * SETTINGS["iterations"]):
        net.head.requires_grad_(step >= free_from)
        optimizer.zero_grad()
        for number in (2 * step, 2 * step + 1):
            task = Points().task(number)
            (F.cross_entropy(net(task.query_x), task.query_y) / 2).backward()
        optimizer.step()
    return net


def same(learner: MetaLearner, net: nn.Module) -> None:
    found = {name: p.detach() for name, p in learner.module.net.named_parameters()}
    wanted = {name: p.detach() for name, p in net.named_parameters()}
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("engine", ["loop", "threads"])
def test_what_no_task_of_a_batch_used_stays(engine):
    net = routed()
    trainer = Trainer(Supervised(net), Points(), Points(), TrainingSettings(**{**SETTINGS, "engine": engine}))
    trainer.fit()
    same(trainer.learner, plain(net))


class Static(Routed):
    def forward(self, x):
        return self.head(torch.tanh(self.even(x)))


@pytest.mark.parametrize("engine", [Loop, Threads, VMap, Trace])
def test_every_engine_says_what_is_unused(engine):
    torch.manual_seed(0)
    net = Static().double()
    nn.init.zeros_(net.head.weight)  # Where the layer before it is used, with a gradient of zero.
    learner, engine = Supervised(net), engine()
    for _ in range(2):
        found = engine.meta_gradient(learner, Points().batch(range(2)), learner.training_phase(0))
        assert {name.removeprefix("module.net.") for name in found.unused} == {
            *("odd.weight", "odd.bias", "never.weight", "never.bias", "empty")
        }
        assert not found.grads["module.net.even.weight"].any()


def test_layers_set_free_after_the_trainer_was_made_train(tmp_path):
    net = routed()
    learner = Supervised(net)
    learner.module.net.head.requires_grad_(False)
    trainer = Trainer(learner, Points(), Points(), TrainingSettings(**SETTINGS), tmp_path)
    trainer.fit(until_epoch=1)
    learner.module.net.head.requires_grad_(True)
    trainer.fit(until_epoch=2)
    # The learner of the resumed run has it frozen at first, as the first one had.
    learner = Supervised(net)
    learner.module.net.head.requires_grad_(False)
    trainer = Trainer.resume(tmp_path, learner, Points(), Points())
    learner.module.net.head.requires_grad_(True)
    trainer.fit()
    same(learner, plain(net, free_from=2))


@pytest.mark.parametrize("older", [False, True])
def test_a_run_goes_on_with_layers_defined_in_another_order(tmp_path, older, monkeypatch):
    """older: from a checkpoint without the optimizer's names."""
    net = routed()
    trainer = Trainer(Supervised(net), Points(), Points(), TrainingSettings(**SETTINGS), tmp_path)
    if older:
        save = CheckpointStore.save

        def without_names(self, state, *more):
            del state["optimizer_names"]
            return save(self, state, *more)

        monkeypatch.setattr(CheckpointStore, "save", without_names)
    trainer.fit(until_epoch=2)
    monkeypatch.undo()
    trainer = Trainer.resume(tmp_path, Supervised(routed(("head", "odd", "never", "even"))), Points(), Points())
    trainer.fit()
    same(trainer.learner, plain(net))


def test_what_cannot_be_known_again_is_refused(tmp_path):
    def rates(*order):
        return MAML(routed(*order), steps=1, improvements=Improvements(layer_step_rates=True)).double()

    source, settings = Points(), TrainingSettings(**SETTINGS)
    Trainer(rates(), source, source, settings, tmp_path / "rates").fit(until_epoch=1)
    with pytest.raises(CheckpointError, match=r"registers 'module\.net\.even\.\w+' in another place.*LayerStepRates"):
        Trainer.resume(tmp_path / "rates", rates(("head", "odd", "never", "even")), source, source)


def test_a_head_that_is_left_out_is_not_decayed():
    learner = ProtoNet(Static().double(), 3)
    before = copy.deepcopy(learner.module.net)
    trainer = Trainer(learner, Points(), Points(), TrainingSettings(**SETTINGS))
    trainer.fit(until_epoch=1)
    moved = {n for n, p in learner.module.net.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert moved == {"even.weight", "even.bias"}
