"""CIFAR-FS and FC100 from an archive as CIFAR-100's is, with three pictures of each class."""

from __future__ import annotations

import pickle
import struct
import sys
import types
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from metahpo.errors import DataError
from metahpo.tasks import Episodes
from metahpo.tasks.cifar import load_cifar_fs, load_fc100

# The classes of CIFAR-100 by superclass (www.cs.toronto.edu/~kriz/cifar.html).
CLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
COARSE = list(CLASSES)
NAMES = sorted(name for names in CLASSES.values() for name in names.split())
ABOVE = [next(i for i, names in enumerate(CLASSES.values()) if name in names.split()) for name in NAMES]
# The training classes of bertinetto/r2d2, and the validation and test classes of FC100.
CIFAR_FS_TRAIN = """apple aquarium_fish bear bee bottle bowl boy bridge bus can castle caterpillar chair clock cloud
    cockroach couch cup dinosaur dolphin elephant forest girl hamster house kangaroo keyboard lawn_mower lion lizard
    lobster mountain mouse mushroom oak_tree orange orchid palm_tree pear pine_tree plate porcupine possum rabbit
    raccoon ray road seal shrew skunk skyscraper snake spider squirrel streetcar sunflower tank tiger train trout tulip
    turtle willow_tree wolf"""
FC100_VAL = """bear camel cattle chimpanzee crab elephant hamster kangaroo leopard lion lobster mouse rabbit shrew
    snail spider squirrel tiger wolf worm"""
FC100_TEST = """baby beaver bee beetle boy butterfly caterpillar cockroach dolphin fox girl man otter porcupine possum
    raccoon seal skunk whale woman"""


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 wrote: byte strings, also for text, and NumPy by its old name."""

    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string

    def save_global(self, obj, name=None):
        module = {"numpy._core.multiarray": "numpy.core.multiarray"}.get(obj.__module__, obj.__module__)
        self.write(pickle.GLOBAL + f"{module}\n{name or obj.__name__}\n".encode())
        self.memoize(obj)

    dispatch[type] = dispatch[types.FunctionType] = dispatch[types.BuiltinFunctionType] = save_global


def dump(path, content, old):
    with path.open("wb") as file:
        (Python2Pickler if old else pickle.Pickler)(file, protocol=2).dump(content)


def picture(c: int, part: int) -> np.ndarray:
    return np.arange(3 * 32 * 32, dtype=np.uint8) // 3 + np.uint8(2 * c + part)


def archive(root, old=True, **changed):
    """cifar-100-python below root: two pictures of each class in train, one in test."""
    folder = root / "cifar-100-python"
    folder.mkdir()
    for part, copies in (("train", 2), ("test", 1)):
        fine = np.random.RandomState(copies).permutation(np.repeat(np.arange(100), copies)).tolist()
        content = {
            "filenames": [f"{NAMES[c]}_s_{i}.png" for i, c in enumerate(fine)],
            "batch_label": f"{part}ing batch 1 of 1",
            "fine_labels": fine,
            "coarse_labels": [ABOVE[c] for c in fine],
            "data": np.stack([picture(c, copies) for c in fine]),
        }
        dump(folder / part, {**content, **changed.get(part, {})}, old)
    meta = {"fine_label_names": NAMES, "coarse_label_names": COARSE}
    dump(folder / "meta", {**meta, **changed.get("meta", {})}, old)
    return folder


def members(data, split):
    return {data.class_names[c] for c in data.splits[split]}


@pytest.mark.parametrize("old", [True, False])
def test_cifar_fs_has_the_published_classes_and_all_pictures(tmp_path, old):
    folder = archive(tmp_path, old)
    assert (b"numpy.core" in (folder / "train").read_bytes()) == old
    data = load_cifar_fs(tmp_path)
    assert [len(data.splits[split]) for split in ("train", "val", "test")] == [64, 16, 20]
    assert members(data, "train") == set(CIFAR_FS_TRAIN.split())
    assert data.class_names == tuple(NAMES)
    assert data.images.shape == (300, 3, 32, 32) and data.images.dtype == torch.uint8
    assert torch.bincount(data.labels).tolist() == [3] * 100
    for image, c, part in zip(data.images, data.labels.tolist(), [2] * 200 + [1] * 100):
        assert torch.equal(image.flatten(), torch.from_numpy(picture(c, part)))
    assert Episodes(data, "test", ways=20, shots=1, queries=2).task(0).query_x.shape == (40, 3, 32, 32)


def test_fc100_is_divided_by_superclass(tmp_path):
    archive(tmp_path)
    data = load_fc100(tmp_path)
    assert members(data, "val") == set(FC100_VAL.split())
    assert members(data, "test") == set(FC100_TEST.split())
    assert len(data.splits["train"]) == 60
    above = {split: {ABOVE[c] for c in data.splits[split]} for split in data.splits}
    assert [len(above[split]) for split in ("train", "val", "test")] == [12, 4, 4]


def refusal(root, **options) -> str:
    with pytest.raises(DataError) as caught:
        load_cifar_fs(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("part", "content", "expected"),
    [
        ("train", {"data": np.zeros((3, 5), np.uint8)}, "found uint8 [3, 5] and 200 labels, expected uint8 [N, 3072]"),
        ("train", {"data": 3}, "has no 'data'"),
        ("test", {"fine_labels": [200] * 100}, "with N labels from 0 to 99"),
        ("test", {"coarse_labels": []}, "expected uint8 [N, 3072]"),
        ("meta", {"fine_label_names": ["cat"] * 100}, "has no class 'beaver', expected the names of CIFAR-100"),
        ("meta", {"coarse_label_names": 3}, "has no 'coarse_label_names'"),
        ("meta", {"more": len}, "is damaged (it asks for "),
    ],
)
def test_a_file_that_is_not_the_archives_is_named(tmp_path, part, content, expected):
    folder = archive(tmp_path, old=False, **{part: content})
    found = refusal(tmp_path)
    assert found.startswith(f"{folder / part}: ")
    assert expected in found


def test_missing_and_damaged_files_are_named(tmp_path):
    folder = tmp_path / "cifar-100-python"
    assert f"{folder / 'meta'}: cannot be read (No such file or directory)" in refusal(tmp_path)
    archive(tmp_path)
    (folder / "test").write_bytes((folder / "test").read_bytes()[:5000])
    assert f"{folder / 'test'}: is damaged" in refusal(tmp_path)


def test_download_goes_through_torchvision_only_where_the_folder_is_missing(tmp_path, monkeypatch):
    for name in ("torchvision", "torchvision.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install 'metahpo[vision]'" in refusal(tmp_path, download=True)
    asked = []

    def download(root, download):
        asked.append((root, download))
        if len(asked) == 1:
            raise RuntimeError("no network")
        archive(tmp_path)

    datasets = types.SimpleNamespace(CIFAR100=download)
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(datasets=datasets))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    assert "could not be downloaded (no network)" in refusal(tmp_path, download=True)
    assert len(load_cifar_fs(tmp_path, download=True).labels) == 300
    load_cifar_fs(tmp_path, download=True)
    assert asked == [(str(tmp_path), True)] * 2
