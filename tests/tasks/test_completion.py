"""Image completion on the digits."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from metahpo.errors import DataError
from metahpo.tasks import TaskSource
from metahpo.tasks.completion import ImageCompletion, digits_by_split


def numbered(count: int = 7, height: int = 3, width: int = 4) -> torch.Tensor:
    """Pixel p of image i is (100 i + p) / 1000."""
    pixels = torch.arange(height * width).reshape(height, width)
    return (100 * torch.arange(count)[:, None, None] + pixels) / 1000


def decoded(task) -> tuple[list[int], list[int], list[tuple[float, float]]]:
    """Image and pixel numbers and places of all points of a task."""
    codes = (torch.cat([task.support_y, task.query_y])[:, 0] * 1000).round().long()
    places = torch.cat([task.support_x, task.query_x])
    return (codes // 100).tolist(), (codes % 100).tolist(), [tuple(place) for place in places.tolist()]


def test_a_task_is_all_pixels_of_one_image_at_their_places():
    source = ImageCompletion(numbered(), "train", shots=5)
    assert isinstance(source, TaskSource)
    assert [list(t.shape) for t in source.task(0)] == [[5, 2], [5, 1], [7, 2], [7, 1]]
    supports = set()
    for index in range(20):
        images, pixels, places = decoded(source.task(index))
        assert len(set(images)) == 1
        assert sorted(pixels) == list(range(12))
        for pixel, (row, column) in zip(pixels, places):
            assert row == pytest.approx(-1 + 2 * (pixel // 4) / 2)
            assert column == pytest.approx(-1 + 2 * (pixel % 4) / 3)
        supports.add(tuple(pixels[:5]))
    assert len(supports) > 15, "the support pixels differ from task to task"


def test_each_round_is_every_image_once_in_another_order():
    source = ImageCompletion(numbered(), "test", shots=2, queries=3)
    rounds = [[decoded(source.task(7 * turn + i))[0][0] for i in range(7)] for turn in range(4)]
    assert all(sorted(images) == list(range(7)) for images in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert source.task(0).query_x.shape == (3, 2)


def test_a_task_depends_on_seed_split_and_number_alone():
    make = lambda split="train", seed=0: ImageCompletion(numbered(), split, shots=4, seed=seed)  # noqa: E731
    batch = make().batch([3, 20, 8])
    for several, one in zip(batch.select(1), make().task(20)):
        assert torch.equal(several, one)
    assert not torch.equal(make(seed=1).batch(range(5)).support_y, make().batch(range(5)).support_y)
    assert not torch.equal(make("val").batch(range(5)).support_y, make().batch(range(5)).support_y)


def test_the_digits_are_all_there_each_in_one_split():
    splits = digits_by_split()
    assert {split: tuple(images.shape) for split, images in splits.items()} == {
        "train": (1197, 8, 8),
        "val": (200, 8, 8),
        "test": (400, 8, 8),
    }
    found = torch.cat(list(splits.values())).mul(16).round().byte().flatten(1)
    expected = torch.from_numpy(load_digits().data).byte()
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, expected.tolist()))


def test_what_the_fitted_baselines_reach_on_the_test_digits():
    """The mean squared errors that a learner is to be below: of the mean training image, and of the support's mean."""
    splits = digits_by_split()
    batch = ImageCompletion(splits["test"], "test", shots=16).batch(range(400))
    rows, columns = ((batch.query_x + 1) * 3.5).round().long().unbind(-1)
    by_image = splits["train"].mean(0)[rows, columns] - batch.query_y[..., 0]
    assert by_image.square().mean().item() == pytest.approx(0.0744, abs=5e-5)
    by_support = batch.support_y.mean(1, keepdim=True) - batch.query_y
    assert by_support.square().mean().item() == pytest.approx(0.1519, abs=5e-5)


@pytest.mark.parametrize("settings", [{"shots": 12}, {"shots": 0}, {"shots": 6, "queries": 7}])
def test_more_pixels_than_there_are_are_refused(settings):
    with pytest.raises(DataError, match="an image has 12 pixels; a task needs"):
        ImageCompletion(numbered(), "train", **settings)
    with pytest.raises(DataError, match=r"found images \[7, 12\], expected \[M, H, W\]"):
        ImageCompletion(numbered().flatten(1), "train")
