"""Images in one folder with a table for each split, as mini-ImageNet is shared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from metahpo.errors import DataError
from metahpo.tasks.images import load_image_folder

ROWS = {
    "train": [("n02_1.jpg", "n02"), ("n01_2.jpg", "n01"), ("n01_1.jpg", "n01"), ("n02_2.jpg", "n02")],
    "val": [("n03_1.jpg", "n03")],
    "test": [("n05_1.jpg", "n05"), ("n04_1.jpg", "n04")],
}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    for split, rows in ROWS.items():
        lines = ["filename,label", *(",".join(row) for row in rows)]
        (tmp_path / f"{split}.csv").write_text("\r\n".join(lines) + "\r\n")
        for filename, label in rows:
            pixels = np.full((6, 6, 3), 10 * int(label[1:]) + int(filename[4]), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / filename, quality=100)
    return tmp_path


def test_classes_and_files_are_those_of_the_tables(root):
    data = load_image_folder(root, size=6)
    assert data.class_names == ("train/n01", "train/n02", "val/n03", "test/n04", "test/n05")
    assert data.splits == {"train": (0, 1), "val": (2,), "test": (3, 4)}
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 3, 4]
    expected = torch.tensor([11, 12, 21, 22, 31, 41, 51])
    assert data.images.shape == (7, 3, 6, 6)
    assert (data.images[:, :, 0, 0] - expected[:, None]).abs().max() <= 1, "JPEG may round"
    assert load_image_folder(root, size=4, channels=1).images.shape == (7, 1, 4, 4)


@pytest.mark.parametrize(
    ("split", "text", "expected"),
    [
        ("train", "", "train.csv, row 1: found '', expected the header 'filename,label'"),
        ("train", "file,label\na.jpg,n01\n", "train.csv, row 1: found 'file,label', expected the header"),
        ("val", "filename,label\n", "val.csv: has no row but its header"),
        ("val", "filename,label\nn03_1.jpg\n", "val.csv, row 2: found 'n03_1.jpg', expected filename,label"),
        ("val", "filename,label\nn03_1.jpg,\n", "val.csv, row 2: found 'n03_1.jpg,', expected filename,label"),
        ("val", "filename,label\nn03_1.jpg,n03\nnone.jpg,n03\n", "none.jpg: no such file"),
        ("test", "filename,label\nn05_1.jpg,n05\nn05_1.jpg,n05\n", "row 3: 'n05_1.jpg' is in "),
        ("test", "filename,label\nn05_1.jpg,n03\n", "row 2: label 'n03' is a class of val.csv already"),
        ("test", b"\xff\xfe\x00", "test.csv: is not a CSV table"),
        ("test", None, "test.csv: cannot be read (No such file or directory)"),
    ],
)
def test_a_wrong_row_is_named(root, split, text, expected):
    path = root / f"{split}.csv"
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        load_image_folder(root, size=6)
    assert expected in str(caught.value)
    assert str(root) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_picture_that_cannot_be_decoded_is_named(root):
    (root / "images" / "n04_1.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"images/n04_1\.jpg: cannot be decoded"):
        load_image_folder(root, size=6)
