from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from metahpo.errors import DataError
from metahpo.tasks import Episodes, LabelledImages, Sinusoid, TaskSource


def data(classes: int = 12, each: int = 6, size: int = 4) -> LabelledImages:
    """Image number j of class c holds the value 10 c + j in its first pixel, 255 in its second; unsorted labels."""
    labels = torch.arange(classes).repeat(each)
    number = torch.arange(each).repeat_interleave(classes)
    images = torch.zeros(classes * each, 1, size, size, dtype=torch.uint8)
    images[:, 0, 0, 0] = (10 * labels + number).to(torch.uint8)
    images[:, 0, 0, 1] = 255
    splits = {"train": tuple(range(8)), "val": (8, 9), "test": (10, 11)}
    return LabelledImages(images, labels, tuple(f"class{c}" for c in range(classes)), splits)


def codes(x: torch.Tensor) -> torch.Tensor:
    return (x[..., 0, 0, 0] * 255).round().long()


def test_tasks_have_the_shapes_labels_and_distinct_images_they_promise():
    source = Episodes(data(), "train", ways=3, shots=2, queries=3, seed=5)
    batch = source.batch(range(50))
    assert batch.support_x.shape == (50, 6, 1, 4, 4)
    assert batch.query_x.shape == (50, 9, 1, 4, 4)
    assert batch.support_x.dtype == torch.float32
    assert batch.support_x.max() == 1
    assert batch.support_y[0].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.query_y[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    seen = set()
    for index in range(50):
        task = batch.select(index)
        support, query = codes(task.support_x), codes(task.query_x)
        assert len({*support.tolist(), *query.tolist()}) == 15, "all images of a task differ"
        classes = {}
        for code, label in zip(
            [*support.tolist(), *query.tolist()], [*task.support_y.tolist(), *task.query_y.tolist()]
        ):
            assert classes.setdefault(label, code // 10) == code // 10, "one class a label"
        assert len(set(classes.values())) == 3
        seen.update(classes.values())
    assert seen == set(range(8)), "every class of the split, and no other"


def test_a_task_depends_on_seed_split_and_number_alone():
    make = lambda split="train", seed=0: Episodes(data(), split, ways=2, shots=1, queries=1, seed=seed)  # noqa: E731
    assert isinstance(make(), TaskSource)
    one, batch = make().task(7), make().batch([3, 7])
    for first, second in zip(one, batch.select(1)):
        assert torch.equal(first, second)
    assert not torch.equal(codes(make(seed=1).batch(range(9)).support_x), codes(make().batch(range(9)).support_x))
    assert not torch.equal(
        codes(make("val").batch(range(9)).support_x) % 10, codes(make("test").batch(range(9)).support_x) % 10
    )


def test_rotation_turns_each_class_of_a_task_by_whole_quarters():
    plain = Episodes(data(), "train", ways=3, shots=1, queries=2).batch(range(40))
    turned = Episodes(data(), "train", ways=3, shots=1, queries=2, rotate=True).batch(range(40))
    quarters = []
    for index in range(40):
        for label in range(3):
            before = torch.cat(
                [plain.support_x[index, label : label + 1], plain.query_x[index, 2 * label : 2 * label + 2]]
            )
            after = torch.cat(
                [turned.support_x[index, label : label + 1], turned.query_x[index, 2 * label : 2 * label + 2]]
            )
            matches = [q for q in range(4) if torch.equal(torch.rot90(before, q, (-2, -1)), after)]
            assert len(matches) == 1, "support and query images of a class turn together"
            quarters += matches
    assert set(quarters) == {0, 1, 2, 3}


def test_classes_with_few_images_are_never_overdrawn():
    full = data(classes=4, each=6)
    keep = [i for i, label in enumerate(full.labels.tolist()) if label != 1 or i < 12]
    uneven = LabelledImages(full.images[keep], full.labels[keep], full.class_names, {"train": (0, 1, 2)})
    source = Episodes(uneven, "train", ways=3, shots=2, queries=1)
    batch = source.batch(range(60))
    for index in range(60):
        drawn = [*codes(batch.support_x[index]).tolist(), *codes(batch.query_x[index]).tolist()]
        assert len(set(drawn)) == 9
        assert all(code % 10 < 3 for code in drawn if code // 10 == 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": 9}, "split 'train' has 8 classes, fewer than the 9 ways of a task"),
        (
            {"queries": 6},
            r"class 'class0' of split 'train' has 6 images; a task needs 7 \(1 shots \+ 6 queries\) \(and 7 more",
        ),
        ({"split": "trian"}, "no split 'trian'; it has train, val, test"),
    ],
)
def test_data_too_small_is_refused_by_name(settings, message):
    with pytest.raises(DataError, match=message):
        Episodes(data(), **{"split": "train", "ways": 2, "shots": 1, "queries": 1, **settings})


def test_any_labelled_dataset_serves():
    pairs = [(Image.fromarray(np.full((5, 5), 10 * c + j, np.uint8)), c) for c in range(4) for j in range(3)]
    source = Episodes.from_dataset(pairs, {"train": [0, 1, 2], "test": [3]}, "train", ways=2, shots=1, queries=2)
    task = source.task(0)
    assert task.support_x.shape == (2, 1, 5, 5)
    assert (codes(task.query_x) // 10).tolist() == (codes(task.support_x) // 10).repeat_interleave(2).tolist()
    with pytest.raises(DataError, match=r"item 0 of the dataset is torch\.float32 \[2, 2\]"):
        Episodes.from_dataset([(torch.zeros(2, 2), 0)], {"train": [0]}, "train", ways=1, shots=1, queries=1)


def test_sinusoids_are_sines_of_the_promised_range():
    source = Sinusoid(shots=5, queries=50, seed=2)
    batch = source.batch(range(300))
    assert batch.support_x.shape == (300, 5, 1)
    assert batch.query_y.shape == (300, 50, 1)
    x, y = batch.query_x.double()[..., 0], batch.query_y.double()[..., 0]
    assert x.abs().max() <= 5
    # y = a sin x + b cos x fits each task exactly, with amplitude in [0.1, 5] and phase in [0, pi].
    basis = torch.stack([torch.sin(x), torch.cos(x)], -1)
    fit = torch.linalg.lstsq(basis, y[..., None]).solution
    assert (basis @ fit - y[..., None]).abs().max() < 1e-5
    amplitude = fit.norm(dim=1)
    assert amplitude.min() >= 0.0999
    assert amplitude.max() <= 5.0001
    phase = torch.atan2(-fit[:, 1], fit[:, 0])
    assert phase.min() > -1e-4
    assert phase.max() < torch.pi + 1e-4
    assert torch.equal(source.task(4).support_y, batch.support_y[4])


def test_pictures_of_any_mode_become_grey_or_rgb_and_odd_data_is_refused():
    def first(image) -> torch.Tensor:
        return Episodes.from_dataset([(image, 0)] * 2, {"train": [0]}, "train", ways=1, shots=1, queries=1).task(0)[0]

    assert first(Image.new("RGBA", (5, 6))).shape == (1, 3, 6, 5)
    assert first(Image.new("1", (5, 6))).shape == (1, 1, 6, 5)
    with pytest.raises(
        DataError, match=r"item 0 of the dataset is torch.uint8 \[4, 4\]; expected a PIL image or uint8"
    ):
        first(torch.zeros(4, 4, dtype=torch.uint8))
    uneven = [(Image.new("L", (4, 4)), 0), (Image.new("L", (5, 4)), 0)]
    with pytest.raises(DataError, match=r"item 1 of the dataset is \[1, 4, 5\], item 0 \[1, 4, 4\]"):
        Episodes.from_dataset(uneven, {"train": [0]}, "train", ways=1, shots=1, queries=1)
    with pytest.raises(DataError, match="empty"):
        Episodes.from_dataset([], {"train": [0]}, "train", ways=1, shots=1, queries=1)


@pytest.mark.parametrize("splits", [{"train": (0, 1), "test": (1, 2)}, {"train": (0, 1, 1)}])
def test_a_class_in_two_splits_is_refused(splits):
    with pytest.raises(DataError, match="class 'class1' is in split 'train' and again"):
        LabelledImages(
            torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.arange(3), ("class0", "class1", "class2"), splits
        )
