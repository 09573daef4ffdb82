"""Variable ways and shots, and support sets of uneven classes."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch

from metahpo.errors import DataError
from metahpo.tasks import Episodes, LabelledImages, Task
from metahpo.tasks.shots import Imbalance


def data(classes: int = 12, each: int = 14) -> LabelledImages:
    """Image number j of class c holds 20 c + j as its only pixel."""
    pixels = (20 * torch.arange(classes)[:, None] + torch.arange(each)).to(torch.uint8)
    names = tuple(f"class{c}" for c in range(classes))
    labels = torch.arange(classes).repeat_interleave(each)
    return LabelledImages(pixels.reshape(-1, 1, 1, 1), labels, names, {"train": tuple(range(classes))})


def episodes(**settings) -> Episodes:
    return Episodes(data(), "train", **{"ways": 5, "shots": 5, "queries": 3, **settings})


def codes(x: torch.Tensor) -> torch.Tensor:
    return (x.flatten() * 255).round().long()


def check_sound(task: Task, sizes: list[int], queries: int) -> None:
    """All images differ, one class a label, sets ordered by class, support sizes as given and queries even."""
    support, query = codes(task.support_x), codes(task.query_x)
    assert len({*support.tolist(), *query.tolist()}) == len(support) + len(query)
    labels = torch.cat([task.support_y, task.query_y])
    classes = torch.cat([support, query]) // 20
    assert len({*zip(labels.tolist(), classes.tolist())}) == len(sizes) == len(set(classes.tolist()))
    assert torch.equal(task.support_y, torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)))
    assert torch.equal(task.query_y, torch.arange(len(sizes)).repeat_interleave(queries))


@pytest.mark.parametrize(
    ("kind", "low", "high", "ways", "shots", "expected"),
    [
        ("linear", 1, 9, 5, 5, [1, 3, 5, 7, 9]),
        ("linear", 4, 6, 5, 5, [4, 4, 5, 6, 6]),
        ("linear", 1, 9, 2, 5, [1, 9]),
        ("linear", 1, 4, 4, 2.5, None),
        ("step", 1, 9, 5, 5, [1, 1, 5, 9, 9]),
        ("step", 1, 9, 4, 3, [1, 1, 1, 9]),
        ("step", 1, 9, 4, 7, [1, 9, 9, 9]),
        ("step", 2, 3, 3, 2, [2, 2, 2]),
    ],
)
def test_sizes_are_those_of_the_paper_in_any_order(kind, low, high, ways, shots, expected):
    imbalance = Imbalance(kind, low, high)
    if expected is None:
        with pytest.raises(DataError, match="not 2 shots"):
            imbalance.check(2)
        return
    imbalance.check(shots)
    orders = {tuple(imbalance.sizes(ways, shots, np.random.default_rng(seed))) for seed in range(40)}
    assert {tuple(sorted(order)) for order in orders} == {tuple(expected)}
    assert len(orders) > 1 or len(set(expected)) == 1


def test_linear_sizes_keep_the_total_for_any_number_of_classes():
    for ways, low, half in product(range(2, 30), range(1, 5), range(1, 8)):
        sizes = Imbalance("linear", low, low + 2 * half).sizes(ways, low + half, np.random.default_rng(0))
        assert (sizes.sum(), sizes.min(), sizes.max()) == (ways * (low + half), low, low + 2 * half)


def test_random_sizes_are_equally_likely_given_their_total():
    """Against all size vectors of the total, enumerated."""
    imbalance, rng, draws = Imbalance("random", 1, 4), np.random.default_rng(3), 6000
    possible = [sizes for sizes in product(range(1, 5), repeat=3) if sum(sizes) == 6]
    found = Counter(tuple(imbalance.sizes(3, 2, rng).tolist()) for _ in range(draws))
    assert set(found) == set(possible)
    expected = draws / len(possible)
    chi_square = sum((count - expected) ** 2 / expected for count in found.values())
    assert chi_square < 27.9, "the 0.1% point with 9 degrees of freedom"
    assert imbalance.sizes(60, 3, rng).sum() == 180


@pytest.mark.parametrize("kind", ["linear", "step", "random"])
def test_uneven_tasks_stack_and_keep_their_total(kind):
    source = episodes(imbalance=Imbalance(kind, 1, 9))
    batch = source.batch(range(30))
    assert batch.support_x.shape == (30, 25, 1, 1, 1)
    sizes = torch.stack([torch.bincount(y, minlength=5) for y in batch.support_y])
    assert sizes.sum(1).tolist() == [25] * 30
    assert len(set(map(tuple, sizes.tolist()))) > 1
    for index in range(30):
        check_sound(batch.select(index), sizes[index].tolist(), 3)
        for one, several in zip(source.task(index), batch.select(index)):
            assert torch.equal(one, several)


def test_ways_and_shots_are_drawn_for_each_group_of_tasks():
    source = episodes(ways=(2, 4), shots=(1, 3), group=4, seed=2)
    seen = Counter()
    for group in range(120):
        batch = source.batch(range(4 * group, 4 * group + 4))
        ways, shots = int(batch.query_y.max()) + 1, int((batch.support_y[0] == 0).sum())
        seen[ways, shots] += 1
        for index in range(4):
            check_sound(batch.select(index), [shots] * ways, 3)
    assert set(seen) == set(product((2, 3, 4), (1, 2, 3)))
    again = episodes(ways=(2, 4), shots=(1, 3), group=4, seed=2)
    for one, several in zip(again.task(4 * group + 1), batch.select(1)):
        assert torch.equal(one, several), "a task is a pure function of its number"


def test_a_batch_across_groups_is_refused():
    source = episodes(shots=(1, 3), group=4)
    source.batch([5, 6])
    with pytest.raises(DataError, match="tasks 3 to 4 do not stack: ways and shots are drawn for each 4 tasks in turn"):
        source.batch([3, 4])
    episodes(group=4).batch([3, 4])


def test_ranges_and_imbalance_go_together():
    batch = episodes(ways=(3, 5), imbalance=Imbalance("random", 2, 8), group=6).batch(range(6))
    ways = int(batch.query_y.max()) + 1
    for index in range(6):
        task = batch.select(index)
        check_sound(task, torch.bincount(task.support_y).tolist(), 3)
        assert len(task.support_y) == 5 * ways


def test_labels_by_class_follow_uneven_sizes():
    plain, by_class = (episodes(imbalance=Imbalance("step", 1, 9), labels=kind).task(3) for kind in ("task", "class"))
    assert torch.equal(plain.support_x, by_class.support_x)
    assert torch.equal(by_class.support_y, codes(by_class.support_x) // 20)
    assert torch.equal(by_class.query_y, codes(by_class.query_x) // 20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": (2, 13)}, "split 'train' has 12 classes, fewer than the 13 ways"),
        ({"shots": (1, 12)}, r"a task needs 15 \(12 shots \+ 3 queries\) \(and 11 more"),
        ({"imbalance": Imbalance("random", 1, 12)}, r"a task needs 15 \(12 shots"),
        ({"imbalance": Imbalance("random", 6, 8)}, "5 shots, the mean, are not between min 6 and max 8"),
        ({"imbalance": Imbalance("linear", 1, 8)}, "the mean from min 1 to max 8 is 4.5, not 5 shots"),
        ({"shots": (4, 5), "imbalance": Imbalance("linear", 1, 9)}, "is 5, not 4 shots"),
    ],
)
def test_what_cannot_be_drawn_is_refused(settings, message):
    with pytest.raises(DataError, match=message):
        episodes(**settings)


@pytest.mark.parametrize(("kind", "low", "high"), [("wave", 1, 3), ("step", 0, 3), ("step", 3, 3)])
def test_an_imbalance_that_is_none_is_refused(kind, low, high):
    with pytest.raises(DataError, match="expected linear, step, random, and 1 <= min < max"):
        Imbalance(kind, low, high)
