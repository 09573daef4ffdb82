"""Run as each rank of a process group, and by one process: what is matched by name and shared by rank 0.

RANK.pt holds what ``results`` gave each rank.
"""

from __future__ import annotations

import os
import signal

import torch
from torch import nn

from metahpo import torchrun
from metahpo.errors import MetaHPOError
from metahpo.learners import MAML
from metahpo.tasks import Task
from metahpo.training import Interrupted, Trainer, TrainingSettings
from metahpo.training.distributed import process_group

SETTINGS = {"epochs": 2, "iterations": 2, "tasks": 2, "val_tasks": 4, "engine": "loop", "optimizer": "SGD", "lr": 0.1}


class Blobs:
    def task(self, index: int) -> Task:
        generator = torch.Generator().manual_seed(index)
        y = torch.arange(3).repeat(4)
        x = torch.randn(12, 3, generator=generator, dtype=torch.float64) + y[:, None]
        return Task(x[:6], y[:6], x[6:], y[6:])

    def batch(self, indices) -> Task:
        return Task(*(torch.stack(parts) for parts in zip(*(self.task(i) for i in indices))))


class Net(nn.Module):
    """Layers of one shape, registered in the order given; a buffer that no state dict holds."""

    def __init__(self, names: list[str], scale: float = 1.0):
        super().__init__()
        for name in names:
            self.add_module(name, nn.BatchNorm1d(3) if name == "norm" else nn.Linear(3, 3))
        self.register_buffer("scale", torch.tensor(scale), persistent=False)
        for name, p in sorted(self.named_parameters()):
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x)))) * self.scale


class Sometimes(MAML):
    """Has a metric for the tasks whose first query is positive."""

    def measure(self, outputs, targets):
        found = super().measure(outputs, targets)
        return {**found, "sometimes": outputs.detach().sum()} if outputs.detach()[0, 0] > 0 else found


def trainer(names: list[str], kind: type[MAML] = MAML, scale: float = 1.0) -> Trainer:
    learner = kind(Net(names, scale).double(), steps=1, inner_lr=0.1)
    return Trainer(learner, Blobs(), Blobs(), TrainingSettings(**SETTINGS, device="cpu", check_gradient=False))


def outcome(trainer: Trainer) -> dict:
    weights = {name: p.detach().clone() for name, p in trainer.learner.named_parameters()}
    return {"history": trainer.history, "weights": weights}


def results(rank: int) -> dict:
    orders = [["first", "norm", "last"], ["last", "norm", "first"]]
    found = {}
    ordered = trainer(orders[rank], Sometimes)
    ordered.fit()
    found["order"] = outcome(ordered)
    # Each rank with weights and a scale of its own: rank 0's are meant.
    apart = trainer(orders[0], scale=1.0 + rank)
    with torch.no_grad():
        apart.learner.module.net.first.weight += rank
    found["evaluated"] = apart.evaluate(Blobs(), 4)
    stopped = trainer(orders[0])
    try:
        stopped.fit(on_epoch=lambda row: os.kill(os.getpid(), signal.SIGTERM))
    except Interrupted:
        stopped.fit()
    found["stopped"] = outcome(stopped)
    try:
        trainer([*orders[0], "more"] if rank else orders[0]).fit()
    except MetaHPOError as error:
        found["refused"] = str(error)
    return found


if __name__ == "__main__":
    with process_group():
        torch.save(results(torchrun.rank()), f"{torchrun.rank()}.pt")
