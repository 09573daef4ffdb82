"""Images that are in two splits, and classes without variety."""

from __future__ import annotations

import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from metahpo.errors import DataError
from metahpo.tasks import Episodes, LabelledImages
from metahpo.tasks.datasets import labelled
from metahpo.tasks.images import load_image_folder


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (4, 4, 3), dtype=np.uint8))


@pytest.fixture
def tables(tmp_path):
    """Writes a data set of tables, test.csv naming the given file."""
    (tmp_path / "images" / "more").mkdir(parents=True)
    for index, name in enumerate("abc"):
        picture(index).save(tmp_path / "images" / f"{name}.png")

    def write(name: str):
        for split, row in (("train", "a.png"), ("val", "b.png"), ("test", name)):
            (tmp_path / f"{split}.csv").write_text(f"filename,label\n{row},{split}\n")
        return tmp_path

    return write


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
@pytest.mark.parametrize("name", ["./a.png", "more/../a.png", "../images/a.png", ".//a.png"])
def test_one_file_in_two_splits_is_refused_by_whatever_path(tables, name, link):
    root = tables(name if link is None else "other.png")
    if link is not None:
        link(root / "images" / "a.png", root / "images" / "other.png")
    with pytest.raises(DataError, match=r"test\.csv, row 2: '.*' is in .*train\.csv, row 2: 'a\.png' already"):
        load_image_folder(root, size=4)


def test_a_link_between_folders_is_refused(tmp_path):
    for index, split in enumerate(("train", "val", "test")):
        (tmp_path / split / "x").mkdir(parents=True)
        picture(index).save(tmp_path / split / "x" / "1.png")
    os.symlink(tmp_path / "train" / "x", tmp_path / "test" / "y")
    with pytest.raises(DataError, match=r"test/y/1\.png is in .*train/x/1\.png already"):
        load_image_folder(tmp_path, size=4)


def test_a_copy_in_another_split_is_said_in_a_line(tables):
    root = tables("A.PNG")
    shutil.copy(root / "images" / "a.png", root / "images" / "A.PNG")
    with pytest.warns(UserWarning, match=r"1 images are copies of images in another split.*A\.PNG of test") as caught:
        load_image_folder(root, size=4)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image_folder(tables("c.png"), size=4)


def test_an_item_of_a_dataset_in_two_splits_is_said():
    items = [(picture(0), 0), (picture(1), 1), (picture(0), 2)]
    with pytest.warns(UserWarning, match="the first is item 2 of test, a copy of item 0 of train"):
        labelled(items, {"train": [0, 1], "test": [2]})


@pytest.mark.parametrize(
    ("shades", "message"),
    [
        ([[1, 1, 1], [2, 3, 4]], "all 3 images of class 'a' are alike; are they"),
        ([[1, 1, 1], [2, 2, 2]], "all 3 images of class 'a' are alike, and so in 1 more classes"),
        ([[255, 255, 255], [255, 255, 255]], "all 6 images are alike"),
        ([[1, 1, 2], [3, 3, 4]], None),
    ],
)
def test_classes_without_variety_are_said_once(shades, message):
    images = torch.tensor(shades, dtype=torch.uint8).reshape(6, 1, 1, 1).expand(6, 1, 2, 2)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    data = LabelledImages(images, labels, ("a", "b"), {"train": (0,), "test": (1,)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for split in data.splits:
            Episodes(data, split, ways=1, shots=1, queries=1)
    found = [str(w.message) for w in caught]
    assert len(found) == (message is not None)
    assert message is None or found[0].startswith(message)
