"""Algorithms of learn2learn in our training."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from metahpo.errors import NetError
from metahpo.interop import Learn2LearnLearner, Learn2LearnTasks
from metahpo.learners import Phase
from metahpo.native.build import library
from metahpo.nets import MLP, Conv4
from metahpo.tasks import Episodes, Sinusoid, Task
from metahpo.tasks.glyphs import load_glyphs
from metahpo.training import Trainer, TrainingSettings
from metahpo.training.engines import Loop, Threads, VMap

STEPS = 2


def algorithms(l2l, net):
    yield l2l.algorithms.MAML(net, lr=0.2)
    yield l2l.algorithms.MAML(net, lr=0.2, first_order=True)
    yield l2l.algorithms.MetaSGD(net, lr=0.2)
    yield l2l.algorithms.GBML(net, transform=l2l.optim.ModuleTransform(l2l.nn.Scale), lr=0.2, adapt_transform=False)


@pytest.mark.parametrize("kind", range(4), ids=["MAML", "FOMAML", "MetaSGD", "GBML"])
def test_the_gradients_are_those_of_its_own_loop(kind, l2l, float64):
    net = Conv4((1, 28, 28), 5, filters=4)
    algorithm = list(algorithms(l2l, net))[kind]
    learner = Learn2LearnLearner(algorithm, steps=STEPS)
    before = copy.deepcopy(learner.state_dict())
    batch = Episodes(load_glyphs(), "train", ways=5, shots=1, queries=2).batch(range(2))
    batch = Task(batch.support_x.double(), batch.support_y, batch.query_x.double(), batch.query_y)
    for task in (batch.select(0), batch.select(1)):
        clone = algorithm.clone()
        for _ in range(STEPS):
            clone.adapt(F.cross_entropy(clone(task.support_x), task.support_y))
        (F.cross_entropy(clone(task.query_x), task.query_y) / 2).backward()
    theirs = [p.grad for p in algorithm.parameters()]
    for engine in (Loop(), Threads()):
        if isinstance(algorithm, l2l.algorithms.GBML) and isinstance(engine, Threads) and library(torch.float64):
            # It views gradients as contiguous ones, which those of the C kernels are not.
            with pytest.raises(NetError, match=r"^learn2learn's GBML cannot adapt the net \(view .*engine loop$"):
                engine.meta_gradient(learner, batch, learner.training_phase(0))
            continue
        result = engine.meta_gradient(learner, batch, learner.training_phase(0))
        assert len(result.grads) == len(theirs)
        for ours, grad in zip(result.grads.values(), theirs):
            torch.testing.assert_close(ours.view_as(grad), grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(learner.state_dict(), before, rtol=0, atol=0)
    means = {n: b for n, b in result.metrics["buffers"].items() if n.endswith("running_mean")}
    assert len(means) == 4 and all(b.abs().max() > 0 for b in means.values())


def test_it_trains_on_its_own_tasks_and_resumes(l2l, tmp_path):
    glyphs, t = load_glyphs(), l2l.data.transforms
    few = glyphs.labels < 60
    dataset = l2l.data.MetaDataset(TensorDataset(glyphs.images[few] / 255, glyphs.labels[few]))
    transforms = [t.FusedNWaysKShots(dataset, n=5, k=4), t.LoadData(dataset), t.RemapLabels(dataset)]
    source = Learn2LearnTasks(l2l.data.Taskset(dataset, transforms), shots=1)
    settings = TrainingSettings.of(epochs=2, iterations=20, tasks=3, val_tasks=20, engine="loop", lr=0.02, threads=1)

    def learner():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5))
        return Learn2LearnLearner(l2l.algorithms.MetaSGD(net, lr=0.1), steps=STEPS)

    whole = Trainer(learner(), source, source, settings)
    start = whole.evaluate(source, 20)
    rows = whole.fit()
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert rows[-1]["val_loss"] < start["loss"] - 0.1
    Trainer(learner(), source, source, settings, tmp_path).fit(until_epoch=1)
    resumed = Trainer.resume(tmp_path, learner(), source, source)
    assert resumed.fit() == rows


def test_regression_evaluated_without_a_graph(l2l):
    learner = Learn2LearnLearner(l2l.algorithms.MAML(MLP([1], 1), lr=0.05), steps=STEPS, loss=F.mse_loss)
    tasks = Sinusoid(shots=5, queries=5).batch(range(2))
    metrics, _ = Loop().evaluate(learner, tasks, Phase())
    losses = Loop().meta_gradient(learner, tasks, Phase()).losses
    torch.testing.assert_close(metrics["loss"], losses)
    with torch.no_grad():
        assert not any(p.requires_grad for p in learner.adapt(*tasks.select(0)[:2], Phase()).params.values())


def test_what_it_refuses(l2l):
    learner = Learn2LearnLearner(l2l.algorithms.MAML(MLP([1], 1), lr=0.05), loss=F.mse_loss)
    with pytest.raises(NetError, match=r"^learn2learn's MAML .* by autograd.*choose engine threads or loop$"):
        VMap().meta_gradient(learner, Sinusoid().batch(range(2)), Phase(training=True))
    with pytest.raises(NetError, match=r"^expected MAML, MetaSGD or GBML of learn2learn, found Linear$"):
        Learn2LearnLearner(nn.Linear(1, 1))
    frozen = MLP([1], 1)
    next(frozen.parameters()).requires_grad_(False)
    learner = Learn2LearnLearner(l2l.algorithms.MAML(frozen, lr=0.05), loss=F.mse_loss)
    with pytest.raises(NetError, match=r"^learn2learn's MAML cannot adapt the net"):
        Loop().meta_gradient(learner, Sinusoid().batch(range(2)), Phase(training=True))
