"""The bundled glyphs: what is in the file, and that the build script still makes it."""

import importlib.util
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from metahpo.tasks.glyphs import load_glyphs

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "build_glyphs.py"


@pytest.fixture(scope="module")
def glyphs():
    return load_glyphs()


@pytest.fixture(scope="module")
def builder():
    pytest.importorskip("matplotlib")
    pytest.importorskip("fontTools")
    spec = importlib.util.spec_from_file_location("build_glyphs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scripts_of(glyphs, split):
    return {glyphs.class_names[i].split("/")[0] for i in glyphs.splits[split]}


def nearest_neighbour_accuracy(glyphs, split, ways, queries=5, classes_in_all=3000):
    """Accuracy of 1-shot episodes in which a query takes the class of the support image nearest in pixels."""
    random = np.random.RandomState(0)
    images = (glyphs.images.view(-1, 20, 784)[list(glyphs.splits[split])] > 0).float()
    classes = np.stack([random.choice(len(images), ways, replace=False) for _ in range(classes_in_all // ways)])
    order = random.rand(*classes.shape, 20).argsort(-1)[..., : queries + 1]
    drawings = images[classes[..., None], order]
    support, query = drawings[:, :, 0], drawings[:, :, 1:].flatten(1, 2)
    distance = support.sum(-1)[:, None] - 2 * query @ support.mT  # squared, less what a query adds to all alike
    return (distance.argmin(-1) == torch.arange(ways).repeat_interleave(queries)).float().mean().item()


def test_shapes_and_values(glyphs):
    count = len(glyphs.class_names)
    assert count == len(set(glyphs.class_names)) > 1400
    assert glyphs.images.shape == (20 * count, 1, 28, 28)
    assert glyphs.images.dtype == torch.uint8 and glyphs.images.unique().tolist() == [0, 255]
    assert glyphs.labels.dtype == torch.int64
    assert torch.equal(glyphs.labels.bincount(), torch.full((count,), 20))


def test_splits_share_no_script_and_hold_every_class(glyphs):
    scripts = {split: scripts_of(glyphs, split) for split in glyphs.splits}
    assert {split: len(names) for split, names in scripts.items()} == {"train": 18, "val": 8, "test": 7}
    assert len(set.union(*scripts.values())) == 33
    assert sorted(i for split in glyphs.splits.values() for i in split) == list(range(len(glyphs.class_names)))
    assert "GREEK" in scripts["train"] and "HEBREW" in scripts["val"] and "TIFINAGH" in scripts["test"]


def test_no_image_is_empty_full_or_clipped(glyphs):
    ink = glyphs.images[:, 0] > 0
    share = ink.float().mean((1, 2))
    assert share.min() > 0.02 and share.max() < 0.8
    border = ink[:, [0, -1]].any((1, 2)) | ink[:, :, [0, -1]].any((1, 2))
    assert not border.any()


def test_no_image_comes_twice(glyphs):
    assert len(torch.unique(glyphs.images.flatten(1), dim=0)) > 0.999 * len(glyphs.images)


@pytest.mark.parametrize(("ways", "expected"), [(5, 0.50), (20, 0.29)])
def test_as_hard_for_pixels_as_omniglot(glyphs, ways, expected):
    """Raw pixels must not solve the tasks; Omniglot gives 0.43 and 0.25."""
    assert nearest_neighbour_accuracy(glyphs, "test", ways) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("name", ["GREEK/03B1", "HEBREW/05D0", "TIFINAGH/2D33"])
def test_rebuilt_classes_equal_the_bundled_ones(glyphs, builder, name):
    """Each class has its own seed; a pixel on the threshold may differ with another FreeType or torch."""
    drawn = builder.draw_class(int(name.split("/")[1], 16))
    stored = (glyphs.images[glyphs.labels == glyphs.class_names.index(name), 0] > 0).numpy()
    assert (drawn != stored).mean() < 0.002


def test_build_is_deterministic_and_read_back_whole(builder):
    classes = [("GREEK", 0x3B1), ("NKO", 0x7CB)]
    first, second = builder.build(classes), builder.build(classes)
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert (first["train"].tolist(), first["val"].tolist(), first["test"].tolist()) == ([0], [], [1])
    images = np.unpackbits(first["bits"].swapaxes(-1, -2), axis=-1, count=28).astype(bool)
    assert np.array_equal(images[1], builder.draw_class(0x7CB))


@pytest.mark.parametrize(
    ("codepoint", "script"),
    [(0x3B1, "GREEK"), (0x3E3, "COPTIC"), (0x41, "LATIN"), (0x35, "PUNCTUATION"), (0x2D00, "NUSKHURI"), (0x4E00, None)],
)
def test_script_of_a_character(builder, codepoint, script):
    assert builder.script_of(codepoint) == script


def test_candidates_have_a_shape_of_their_own(builder):
    refused = [0x20, 0x301, 0xE000, 0xE9, 0xBD]  # blank, combining mark, private use, letter with accent, fraction
    assert not any(map(builder.is_candidate, refused))
    assert builder.is_candidate(0x65)


def test_file_is_small_and_licences_are_beside_it():
    data = resources.files("metahpo.tasks") / "data"
    assert len((data / "glyphs.npz").read_bytes()) <= 1_100_000
    assert "Bitstream" in (data / "LICENSE_DEJAVU").read_text(encoding="utf-8")
    assert "STIX" in (data / "LICENSE_STIX").read_text(encoding="utf-8")
