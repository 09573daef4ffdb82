"""Task sets of learn2learn as task sources."""

from __future__ import annotations

import random

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from metahpo.custom import check_source
from metahpo.errors import DataError
from metahpo.interop import Learn2LearnTasks

WAYS, SHOTS, EACH = 4, 2, 5


@pytest.fixture
def dataset(l2l):
    """10 classes of 8; an item is its own number, so that a task shows what it took."""
    labels = torch.arange(80) % 10
    return l2l.data.MetaDataset(TensorDataset(torch.arange(80.0)[:, None], labels))


def transforms(l2l, dataset, fused=True):
    t = l2l.data.transforms
    first = (
        [t.FusedNWaysKShots(dataset, n=WAYS, k=EACH)] if fused else [t.NWays(dataset, WAYS), t.KShots(dataset, EACH)]
    )
    return [*first, t.LoadData(dataset), t.RemapLabels(dataset)]


@pytest.mark.parametrize("fused", [True, False])
def test_tasks_are_pure_functions_of_their_numbers(l2l, dataset, fused):
    taskset = l2l.data.Taskset(dataset, transforms(l2l, dataset, fused))
    source = Learn2LearnTasks(taskset, shots=SHOTS, seed=3)
    state = random.getstate()
    tasks = [source.task(i) for i in range(20)]
    assert random.getstate() == state
    random.seed(99)
    batch = Learn2LearnTasks(taskset, shots=SHOTS, seed=3).batch(range(19, -1, -1))
    for i, task in enumerate(tasks):
        for part, its in zip(batch.select(19 - i), task):
            torch.testing.assert_close(part, its, rtol=0, atol=0)
    assert len({tuple(task.support_x.flatten().tolist()) for task in tasks}) == 20
    assert not torch.equal(Learn2LearnTasks(taskset, shots=SHOTS, seed=4).task(0).support_x, tasks[0].support_x)
    check_source(source, "tasks", 100)


def test_support_and_query_are_of_one_class_each_and_apart(l2l, dataset):
    source = Learn2LearnTasks(l2l.data.Taskset(dataset, transforms(l2l, dataset)), shots=SHOTS)
    for i in range(20):
        task = source.task(i)
        assert task.support_y.tolist() == [c for c in range(WAYS) for _ in range(SHOTS)]
        assert task.query_y.tolist() == [c for c in range(WAYS) for _ in range(EACH - SHOTS)]
        support, query = (x.flatten().long() for x in (task.support_x, task.query_x))
        assert len({*support.tolist(), *query.tolist()}) == WAYS * EACH
        classes = (support % 10).view(WAYS, SHOTS)
        assert (classes == classes[:, :1]).all() and len(classes.unique()) == WAYS
        assert ((query % 10).view(WAYS, -1) == classes[:, :1]).all()


def test_a_set_of_so_many_tasks_is_gone_through_again(l2l, dataset):
    taskset = l2l.data.Taskset(dataset, transforms(l2l, dataset), num_tasks=3)
    source = Learn2LearnTasks(taskset, shots=SHOTS)
    first, fourth, second = source.task(0), source.task(3), source.task(1)
    assert torch.equal(first.support_x, fourth.support_x)
    assert not torch.equal(first.support_x, second.support_x)
    assert not taskset.sampled_descriptions


class Noisy(Dataset):
    def __len__(self):
        return 80

    def __getitem__(self, index):
        return torch.randn(1), index % 10


def test_what_it_refuses(l2l, dataset):
    t = l2l.data.transforms
    wrong = [
        (dataset, SHOTS, "^expected a Taskset of learn2learn, found MetaDataset$"),
        (l2l.data.Taskset(dataset, transforms(l2l, dataset)[:2]), SHOTS, "labels .* expected integers 0..ways-1"),
        (l2l.data.Taskset(dataset, transforms(l2l, dataset)), EACH, "a task has 5 of each class, too few for 5 shots"),
        (l2l.data.Taskset(dataset, transforms(l2l, dataset)), 0, "shots must be at least 1, found 0"),
        (
            l2l.data.Taskset(dataset, [t.FusedNWaysKShots(dataset, n=2, k=99)]),
            1,
            "for task 0: ValueError: Sample larger",
        ),
        (l2l.data.Taskset(dataset, [t.FusedNWaysKShots(dataset, n=2, k=3)]), 1, "for task 0: "),
    ]
    noisy = l2l.data.MetaDataset(Noisy())
    wrong.append((l2l.data.Taskset(noisy, transforms(l2l, noisy)), SHOTS, "two different tasks of one seed"))
    named = l2l.data.MetaDataset(dataset.dataset, indices_to_labels={i: "abcdefghij"[i % 10] for i in range(80)})
    wrong.append((l2l.data.Taskset(named, transforms(l2l, named)), SHOTS, "labels are strings"))
    for taskset, shots, message in wrong:
        with pytest.raises(DataError, match=message):
            Learn2LearnTasks(taskset, shots=shots)
