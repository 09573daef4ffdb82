"""Any labelled data set, from Python and from a config."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from metahpo.building_data import build_tasks
from metahpo.config_file import load_config
from metahpo.errors import DataError, MetaHPOError
from metahpo.tasks.datasets import divided, labelled

CODE = """
import numpy as np
from PIL import Image

class Squares:
    classes = [f"shade {c}" for c in range(20)]
    def __init__(self, each=4, **kwargs):
        self.each = each
    def __len__(self):
        return 20 * self.each
    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError(i)
        return Image.fromarray(np.full((6, 6 + i % 2), 10 * (i % 20), np.uint8)), i % 20

def nothing():
    return 3

def failing():
    class Broken(Squares):
        def __getitem__(self, i):
            raise RuntimeError("disc on fire")
    return Broken()
"""
CONFIG = """
data: {source: dataset, dataset: "squares_code:Squares", args: {each: 3}, size: 5, ways: 2, shots: 1, queries: 2}
net: mlp
learner: maml
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "squares_code.py").write_text(CODE)
    sys.modules.pop("squares_code", None)
    (tmp_path / "run.yaml").write_text(CONFIG)
    yield lambda *overrides: load_config(tmp_path / "run.yaml", overrides)
    sys.modules.pop("squares_code", None)


def test_a_config_draws_from_a_data_set_of_ones_own(config):
    tasks = build_tasks(config())
    names = {split: {tasks[split].class_names[c] for c in tasks[split]._classes} for split in tasks}
    assert [len(names[split]) for split in ("train", "val", "test")] == [13, 3, 4]
    assert len(set.union(*names.values())) == 20, "no class in two splits"
    task = tasks["test"].task(0)
    assert task.support_x.shape == (2, 1, 5, 5)
    shades = (task.support_x[:, 0, 0, 0] * 25.5).round().int().tolist()
    assert {f"shade {shade}" for shade in shades} <= names["test"]
    other = build_tasks(config("data.class_seed=1"))["test"]
    assert {other.class_names[c] for c in other._classes} != names["test"]
    assert build_tasks(config("data.channels=3"))["val"].task(0).support_x.shape == (2, 3, 5, 5)


def test_a_name_without_a_module_is_torchvisions(config, monkeypatch):
    overrides = ["data.dataset=EuroSAT", "data.args={root: here, download: true}"]
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DataError, match=r"EuroSAT needs torchvision, which is not installed: pip install 'metahpo\[v"):
        build_tasks(config(*overrides))
    datasets = types.ModuleType("torchvision.datasets")
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(datasets=datasets))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    namespace: dict = {}
    exec(CODE, namespace)
    called = []
    datasets.EuroSAT = type("EuroSAT", (namespace["Squares"],), {"__init__": lambda self, **args: called.append(args)})
    datasets.EuroSAT.each = 3
    assert config(*overrides).data.download
    assert build_tasks(config(*overrides))["train"].task(0).support_x.shape == (2, 1, 5, 5)
    assert called == [{"root": "here", "download": True}]
    with pytest.raises(MetaHPOError, match="torchvision has no dataset 'EuroSat'; did you mean 'EuroSAT'"):
        build_tasks(config("data.dataset=EuroSat"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.dataset='squares_code:None_'", "data.dataset: 'squares_code' .* has no function or class 'None_'"),
        ("data.dataset='squares_code:nothing'", "data.dataset: squares_code:nothing cannot be called as"),
        ("data.args={eech: 3, each: 2}", "class 'shade .*' of split 'train' has 2 images; a task needs 3"),
        ("data.size=null", r"item 1 of the dataset is \[1, 6, 7\], item 0 \[1, 6, 6\]; give a size"),
        ("data.fractions=[0.9, 0.05, 0.05]", "split 'val' has 1 classes, fewer than the 2 ways"),
        ("data.fractions=[0.5, 0.3, 0.3]", r"data.fractions: should have the sum 1, found \[0.5, 0.3, 0.3\]"),
        ("data.fractions=0.5", "data.fractions: "),
        ("data.fractions=[0.9, 0.2, -0.1]", "data.fractions.2: should be greater than 0"),
        ("data.channels=2", "data.channels: should be 1, 3 or None"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(config, override, message):
    with pytest.raises(MetaHPOError, match=message) as caught:
        build_tasks(config(override))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [("nothing", "gave int, expected a Dataset with a length"), ("failing", "cannot be read: RuntimeError: disc on f")],
)
def test_a_function_that_gives_no_data_set_is_named(config, function, message):
    with pytest.raises(MetaHPOError, match=f"data.dataset: squares_code:{function} {message}"):
        build_tasks(config(f"data.dataset='squares_code:{function}'", "data.args={}"))


def test_pictures_are_resized_as_pillow_does_and_labels_of_any_integer_kind_taken():
    pixels = np.random.RandomState(0).randint(0, 256, (9, 7, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    data = labelled([(picture, 0), (tensor, np.int64(2)), (picture, torch.tensor(1))], {"train": [0, 1, 2]}, size=5)
    expected = torch.from_numpy(np.array(picture.resize((5, 5), Image.Resampling.LANCZOS))).permute(2, 0, 1)
    assert all(torch.equal(image, expected) for image in data.images)
    assert data.labels.tolist() == [0, 2, 1]
    grey = labelled([(picture, 0)], {"train": [0]}, channels=1).images
    assert torch.equal(grey[0, 0], torch.from_numpy(np.array(picture.convert("L"))))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((Image.new("L", (4, 4)), "cat"), "item 0 of the dataset has the label 'cat', expected a whole number"),
        ((Image.new("L", (4, 4)), -1), "has the label -1"),
        ((Image.new("L", (4, 4)), 1.0), "has the label 1.0"),
        ((Image.new("L", (4, 4)),), r"item 0 of the dataset is no \(image, label\)"),
        ((torch.zeros(2, 4, 4, dtype=torch.uint8), 0), "2 channels cannot be resized"),
    ],
)
def test_an_item_that_is_no_labelled_picture_is_named(item, message):
    with pytest.raises(DataError, match=message):
        labelled([item], {"train": [0]}, size=3)


def test_classes_are_divided_by_fractions_without_a_rest():
    parts = divided(range(10, 33), (0.64, 0.16, 0.2), seed=0)
    assert {split: len(part) for split, part in parts.items()} == {"train": 15, "val": 3, "test": 5}
    assert sorted(sum(parts.values(), ())) == list(range(10, 33))
    assert parts == divided(range(10, 33), (0.64, 0.16, 0.2), seed=0) != divided(range(10, 33), (0.64, 0.16, 0.2), 1)
