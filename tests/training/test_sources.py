"""Sources of tasks that are not what they should be are refused before they do harm."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metahpo.errors import DataArgumentError
from metahpo.learners import MAML
from metahpo.tasks import Task
from metahpo.training import Trainer, TrainingSettings
from metahpo.training.evaluation import evaluate

SETTINGS = TrainingSettings(
    epochs=1, iterations=2, tasks=2, val_tasks=4, engine="loop", device="cpu", check_gradient=False
)


class Source:
    """Task i holds i everywhere."""

    def task(self, index):
        return Task(*(torch.full((3, 1), float(index)) for _ in range(4)))

    def batch(self, indices):
        return Task(*map(torch.stack, zip(*map(self.task, indices))))


class Drawing(Source):
    def task(self, index):
        return Task(*(torch.full((3, 1), float(np.random.rand())) for _ in range(4)))


class Counting(Source):
    def __init__(self):
        self.count = itertools.count()

    def task(self, index):
        return Task(*(torch.full((3, 1), float(next(self.count))) for _ in range(4)))


class Disagreeing(Source):
    """A batch of other tasks than its tasks."""

    def batch(self, indices):
        return super().batch([index + 1 for index in indices])


class Short(Source):
    def __init__(self, size):
        self.tasks = [super(Short, self).task(i) for i in range(size)]

    def task(self, index):
        return self.tasks[index]


class Slicing(Source):
    """A batch of fewer tasks than asked for."""

    def batch(self, indices):
        return super().batch([index for index in indices if index < 3])


def learner():
    return MAML(nn.Linear(1, 1), steps=1, loss=F.mse_loss)


@pytest.mark.parametrize("source", [Drawing, Counting, Disagreeing])
def test_a_source_whose_task_is_another_when_asked_again_is_refused(source):
    for part in ("train", "validate", "test"):
        with pytest.raises(DataArgumentError, match=r"\.(batch|task): support_x of .* is another when it is asked"):
            if part == "test":
                evaluate(learner(), source(), 4, SETTINGS)
            else:
                sources = (source(), Source()) if part == "train" else (Source(), source())
                Trainer(learner(), *sources, SETTINGS).fit()


def test_a_source_with_too_few_tasks_is_refused_before_the_first_step():
    model = learner()
    before = [p.clone() for p in model.parameters()]
    for sources, told in (
        ((Source(), Short(3)), r"val_tasks: Short has no task number 3 \(IndexError.*4 tasks are asked for"),
        ((Short(3), Source()), r"train_tasks: Short has no task number 3 \(IndexError.*4 tasks are asked for"),
    ):
        with pytest.raises(DataArgumentError, match=told):
            Trainer(model, *sources, SETTINGS).fit()
    with pytest.raises(DataArgumentError, match="tasks: Short has no task number 4"):
        evaluate(model, Short(4), 5, SETTINGS)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    Trainer(model, Short(4), Short(4), SETTINGS).fit()


def test_a_batch_of_fewer_tasks_than_asked_for_is_refused():
    with pytest.raises(DataArgumentError, match=r"Slicing.batch: support_x is \[1, 3, 1\], expected \[2, N, ...\]"):
        evaluate(learner(), Slicing(), 4, SETTINGS)
