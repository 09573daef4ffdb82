"""The image folder loader."""

import numpy as np
import pytest
import torch
from PIL import Image

from metahpo.errors import DataError
from metahpo.tasks.images import load_image_folder

LAYOUT = {"train": ("cat", "ant"), "val": ("cat",), "test": ("dog", "eel")}


def picture(seed, side=12):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.fixture
def root(tmp_path):
    """Five classes of two 12x12 RGB images; b.png is written before a.png."""
    for i, (split, name) in enumerate((split, name) for split, names in LAYOUT.items() for name in names):
        folder = tmp_path / split / name
        folder.mkdir(parents=True)
        picture(2 * i + 1).save(folder / "b.png")
        picture(2 * i).save(folder / "a.png")
    return tmp_path


def fails(root, *parts, **options):
    with pytest.raises(DataError) as caught:
        load_image_folder(root, **{"size": 12, **options})
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_classes_splits_and_order(root):
    data = load_image_folder(root, size=12)
    assert data.class_names == ("train/ant", "train/cat", "val/cat", "test/dog", "test/eel")
    assert data.splits == {"train": (0, 1), "val": (2,), "test": (3, 4)}
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] and data.labels.dtype == torch.int64
    assert data.images.shape == (10, 3, 12, 12) and data.images.dtype == torch.uint8
    seeds = (2, 3, 0, 1, 4, 5, 6, 7, 8, 9)  # ant was written second
    for image, seed in zip(data.images, seeds, strict=True):
        assert torch.equal(image, torch.from_numpy(np.array(picture(seed))).permute(2, 0, 1))


def test_resized_and_grey_as_pillow_does(root):
    data = load_image_folder(root, size=8, channels=1)
    expected = picture(2).convert("L").resize((8, 8), Image.Resampling.LANCZOS)
    assert data.images.shape == (10, 1, 8, 8)
    assert torch.equal(data.images[0, 0], torch.from_numpy(np.array(expected)))


def test_every_kind_of_file_and_no_other(root):
    folder = root / "val" / "cat"
    for name in ("c.jpg", "d.JPEG", "e.bmp", "f.webp"):
        picture(1, 20).save(folder / name)
    picture(1).convert("P").save(folder / "g.png")
    picture(1).convert("RGBA").save(folder / "h.png")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"no image")
    assert (load_image_folder(root, size=12).labels == 2).sum() == 2 + 6


def test_missing_root(tmp_path):
    fails(tmp_path / "none", str(tmp_path / "none"), "no such folder", "{train,val,test}/CLASS")


def test_missing_split(root):
    (root / "val").rename(root / "validation")
    fails(root, str(root / "val"), "no such folder")


def test_split_without_classes(root):
    (root / "test").rename(root / "old")
    (root / "test").mkdir()
    fails(root, str(root / "test"), "no class folder")


def test_empty_class_is_named(root):
    (root / "train" / "bee").mkdir()
    (root / "train" / "bee" / "notes.txt").write_text("none yet")
    fails(root, str(root / "train" / "bee"), "found no image", ".png")


def test_undecodable_file_is_named(root):
    (root / "test" / "dog" / "c.jpg").write_bytes(b"no image")
    fails(root, str(root / "test" / "dog" / "c.jpg"), "cannot be decoded", "no known image format")


def test_file_cut_short_is_named(root):
    file = root / "test" / "dog" / "a.png"
    file.write_bytes(file.read_bytes()[:200])
    fails(root, str(file), "cannot be decoded")


@pytest.mark.parametrize("options", [{"channels": 2}, {"size": 0}])
def test_bad_arguments(root, options):
    fails(root, "expected 1 or 3 channels and size >= 1", **options)
