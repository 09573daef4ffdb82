"""Training on tasks whose ways and shots change from batch to batch."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

from metahpo.errors import DataError
from metahpo.learners import MAMLPlusPlus
from metahpo.tasks import Episodes, LabelledImages
from metahpo.training import Trainer, TrainingSettings
from metahpo.training.engines import ENGINES, Loop

TASKS, MOST = 2, 4


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def source(split: str = "train", **settings) -> Episodes:
    images = torch.randint(0, 256, (8 * 6, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(8).repeat_interleave(6)
    data = LabelledImages(images, labels, tuple("abcdefgh"), {split: tuple(range(8))})
    return Episodes(data, split, **{"ways": (2, MOST), "shots": (1, 3), "queries": 2, "group": TASKS, **settings})


def learner(dtype: torch.dtype = torch.float32) -> MAMLPlusPlus:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 6), torch.nn.ReLU(), torch.nn.Linear(6, MOST))
    return MAMLPlusPlus(net.to(dtype), steps=2, inner_lr=0.1, loss=F.cross_entropy)


@pytest.mark.parametrize("name", ["threads", "vmap", "trace", "auto"])
def test_every_engine_gives_the_numbers_of_loop_whatever_the_batch(name):
    tasks, engine, maml = source(), ENGINES[name](), learner(torch.float64)
    phase = maml.training_phase(0)
    shapes = set()
    for group in range(5):
        batch = tasks.batch(range(group * TASKS, (group + 1) * TASKS)).to("cpu")
        batch = batch._replace(support_x=batch.support_x.double(), query_x=batch.query_x.double())
        shapes.add(batch.support_x.shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "engine trace: batches of other shapes")
            found = engine.meta_gradient(maml, batch, phase)
        expected = Loop().meta_gradient(maml, batch, phase)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.grads, expected.grads, rtol=1e-9, atol=1e-12)
    assert len(shapes) >= 4


def run(folder, **settings) -> Trainer:
    return Trainer(learner(), source(), fixed(), TrainingSettings(**(SETTINGS | settings)), folder)


def fixed() -> Episodes:
    return source("val", ways=3, shots=1)


SETTINGS = {"epochs": 2, "iterations": 5, "tasks": TASKS, "val_tasks": 5, "engine": "vmap", "threads": 1}


def test_a_resumed_run_sees_the_same_tasks(tmp_path):
    whole, parts = run(tmp_path / "whole"), run(tmp_path / "parts")
    whole.fit()
    parts.fit(until_iteration=7)
    resumed = Trainer.resume(tmp_path / "parts", learner(), source(), fixed())
    resumed.fit()
    assert resumed.history == whole.history
    for name, tensor in whole.learner.state_dict().items():
        assert torch.equal(tensor, resumed.learner.state_dict()[name]), name


def test_what_does_not_stack_is_refused_in_a_line(tmp_path):
    with pytest.raises(DataError, match="do not stack: ways and shots are drawn for each 2 tasks"):
        run(None, tasks=3).fit()
    with pytest.raises(DataError, match="cannot be evaluated together"):
        run(None).evaluate(source(), 8)
