"""Accuracy by every layout of outputs, against a count by hand."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metahpo.functional.trees import map_tree
from metahpo.learners import MAML
from metahpo.learners.accuracy import accuracy
from metahpo.tasks import Task
from metahpo.training import Trainer, TrainingSettings, evaluate_run
from metahpo.training.engines import Loop, VMap


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def labels(classes: int, *shape: int) -> torch.Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


def counted(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """By one label after the other; logits: [..., C]."""
    rows = zip(logits.reshape(-1, logits.shape[-1]).tolist(), targets.flatten().tolist())
    right = [max(range(len(row)), key=row.__getitem__) == label for row, label in rows if label != -100]
    return sum(right) / len(right)


@pytest.mark.parametrize("shape", [(), (5,), (5, 7), (5, 4, 6), (3, 3, 3), (2, 3, 2, 3)])
def test_classes_are_on_the_axis_that_torchs_cross_entropy_takes(shape):
    axis = min(1, len(shape))
    logits, targets = random(*shape[:1], 3, *shape[1:]), labels(3, *shape)
    F.cross_entropy(logits, targets)
    assert accuracy(logits, targets).item() == counted(logits.movedim(axis, -1), targets)


def test_classes_may_come_last_where_only_that_fits():
    logits, targets = random(5, 7, 3), labels(3, 5, 7)
    assert accuracy(logits, targets).item() == counted(logits, targets)


def test_ignored_labels_do_not_count():
    logits, targets = random(4, 3, 6), labels(3, 4, 6)
    targets[:, ::2] = -100
    assert accuracy(logits, targets).item() == counted(logits.movedim(1, -1), targets)
    targets[targets == -100] = 9
    expected = accuracy(logits, targets.where(targets != 9, -100))
    assert accuracy(logits, targets, nn.CrossEntropyLoss(ignore_index=9)) == expected


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_one_logit_a_label_is_judged_by_its_sign(shape):
    logits, targets = random(*shape), labels(2, 6)
    expected = sum((v > 0) == bool(t) for v, t in zip(logits.flatten().tolist(), targets.tolist())) / 6
    assert accuracy(logits, targets).item() == pytest.approx(expected)
    assert accuracy(logits, targets.bool()).item() == pytest.approx(expected)
    assert accuracy(logits.sigmoid(), targets, nn.BCELoss()).item() == pytest.approx(expected)


class Output(NamedTuple):
    logits: torch.Tensor
    hidden: torch.Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, x[:, :1]),
        lambda x: [x],
        lambda x: {"aux": -x, "logits": x},
        lambda x: {"out": x, "aux": -x},
        lambda x: {"scores": x},
        lambda x: Output(x, -x),
    ],
)
def test_of_several_outputs_the_main_one_is_judged(wrap):
    logits, targets = random(6, 3), labels(3, 6)
    assert accuracy(wrap(logits), targets) == accuracy(logits, targets)


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (random(6, 3), random(6, 3)),
        (random(6, 3), labels(3, 5)),
        (random(6, 3, 2), labels(3, 6)),
        ({"a": random(6, 3), "b": random(6, 3)}, labels(3, 6)),
        ((), labels(3, 6)),
        ("text", labels(3, 6)),
    ],
)
def test_where_nothing_fits_there_is_no_accuracy(outputs, targets):
    assert accuracy(outputs, targets) is None


def test_half_precision_does_not_round_the_share():
    logits = torch.zeros(1000, 2, dtype=torch.bfloat16)
    logits[:501, 1] = 1
    assert accuracy(logits, torch.ones(1000, dtype=torch.int64)).item() == pytest.approx(0.501, rel=1e-6)


class Dense(nn.Module):
    """A dict of logits [N, 3, 4, 4] and a penalty, as segmentation nets give."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 1)

    def forward(self, x):
        return {"out": self.convolution(x), "penalty": (self.convolution.weight.square().sum(),)}


def loss(outputs, targets):
    return F.cross_entropy(outputs["out"], targets) + 0.01 * outputs["penalty"][0]


class Segments:
    """Pixels by brightness."""

    def task(self, index: int) -> Task:
        x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(index))
        y = (x[:, 0] * 3).long()
        return Task(x[:2], y[:2], x[2:], y[2:])

    def batch(self, indices) -> Task:
        return Task(*(torch.stack(parts) for parts in zip(*map(self.task, indices))))


def test_a_net_of_dicts_and_dense_labels_trains_and_is_tested_on_every_engine(tmp_path):
    torch.manual_seed(0)
    learner = MAML(Dense(), steps=2, loss=loss)
    settings = TrainingSettings(
        epochs=2, iterations=2, tasks=2, val_tasks=3, test_tasks=3, keep_best=2, engine="loop", device="cpu"
    )
    trainer = Trainer(learner, Segments(), Segments(), settings, tmp_path)
    trainer.fit()
    rows = evaluate_run(tmp_path, learner, Segments(), 3, settings)
    shares = []
    for index in range(3):
        task = Segments().task(index)
        fitted = learner.fitted(task.support_x, task.support_y)
        shares.append(counted(fitted(task.query_x)["out"].movedim(1, -1), task.query_y))
    assert rows["best"]["accuracy"] == pytest.approx(sum(shares) / 3, rel=1e-6)
    assert rows["ensemble of 2"]["loss"] > 0
    tasks = Segments().batch([0, 1])
    metrics, outputs = Loop().evaluate(learner, tasks, learner.training_phase(0))
    others, batched = VMap().evaluate(learner, tasks, learner.training_phase(0))
    torch.testing.assert_close(metrics, others)
    assert outputs["after"]["out"].shape == (2, 4, 3, 4, 4)
    torch.testing.assert_close(map_tree(torch.clone, outputs), batched)
