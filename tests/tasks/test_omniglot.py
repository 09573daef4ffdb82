"""The Omniglot loader: on a tiny imitation of the archives, and on the real ones where they are at hand."""

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metahpo.errors import DataError
from metahpo.tasks import omniglot
from metahpo.tasks.omniglot import load_omniglot

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "omniglot"
needs_real = pytest.mark.skipif(not (REAL / "images_background.zip").is_file(), reason="Omniglot is not at hand")
TINY = {"images_background": 8, "images_evaluation": 3}


def drawing(seed):
    ink = np.random.RandomState(seed).rand(105, 105) < 0.2
    file = io.BytesIO()
    Image.fromarray(~ink).save(file, "png")
    return file.getvalue()


def tiny_files(part):
    """One character of each of seven alphabets (and a second of the first), or three characters of the eighth."""
    if part == "images_background":
        names = [f"{alphabet}/character01" for alphabet in "BCDEFGH"] + ["B/character02"]
    else:
        names = [f"A/character{i:02d}" for i in (1, 2, 3)]
    order = [(name, drawer) for name in names for drawer in (2, 1)]  # not in the order that is to come out
    return {f"{part}/{name}/{drawer:02d}.png": drawing(seed_of(name, drawer)) for name, drawer in order}


def seed_of(name, drawer):
    return [*name.encode(), drawer]


def write_zip(root, part, files):
    root.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(root / f"{part}.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def write_folder(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


@pytest.fixture
def tiny(monkeypatch):
    """Archives small enough for a test: 8 and 3 characters by 2 drawers."""
    monkeypatch.setattr(omniglot, "CHARACTERS", TINY)
    monkeypatch.setattr(omniglot, "DRAWERS", 2)
    return {part: tiny_files(part) for part in TINY}


@pytest.fixture
def root(tiny, tmp_path):
    for part, files in tiny.items():
        write_zip(tmp_path, part, files)
    return tmp_path


def test_zip_folder_and_torchvision_layout_agree(tiny, root, tmp_path):
    write_folder(tmp_path / "folder", tiny["images_background"])
    write_zip(tmp_path / "folder", "images_evaluation", tiny["images_evaluation"])
    for files in tiny.values():
        write_folder(tmp_path / "vision" / "omniglot-py", files)
    zipped = load_omniglot(root, split="alphabet")
    for other in ("folder", "vision"):
        loaded = load_omniglot(tmp_path / other, split="alphabet")
        assert torch.equal(loaded.images, zipped.images)
        assert (loaded.class_names, loaded.splits) == (zipped.class_names, zipped.splits)


def test_order_and_pixels_are_those_of_pillow(tiny, root):
    data = load_omniglot(root, split="alphabet")
    assert data.class_names[:5] == ("A/character01", "A/character02", "A/character03", "B/character01", "B/character02")
    assert data.labels.tolist() == [i for i in range(11) for _ in (1, 2)]
    for index, (name, drawer) in enumerate((name, drawer) for name in data.class_names for drawer in (1, 2)):
        image = Image.open(io.BytesIO(drawing(seed_of(name, drawer)))).convert("L")
        expected = np.array(image.resize((28, 28), Image.Resampling.LANCZOS))
        assert torch.equal(data.images[index, 0], torch.from_numpy(expected))


def test_alphabet_split(root):
    data = load_omniglot(root, split="alphabet")
    alphabets = {split: {data.class_names[i][0] for i in indices} for split, indices in data.splits.items()}
    chosen = np.random.RandomState(0).permutation(7)[:5]
    assert alphabets["test"] == {"A"}
    assert alphabets["val"] == {"BCDEFGH"[i] for i in chosen}
    assert alphabets["train"] == set("BCDEFGH") - alphabets["val"]
    assert sorted(i for indices in data.splits.values() for i in indices) == list(range(11))


def test_shuffled_split_is_one_permutation_cut_in_three():
    splits = omniglot.shuffled_split()
    order = np.random.RandomState(0).permutation(1623).tolist()
    assert {split: len(indices) for split, indices in splits.items()} == {"train": 1150, "val": 50, "test": 423}
    assert [*splits["train"], *splits["val"], *splits["test"]] == order


def test_junk_in_a_zip_is_passed_over(tiny, tmp_path):
    for part, files in tiny.items():
        first = next(iter(files))
        junk = {f"__MACOSX/{first}": b"x", f"{part}/B/character01/._1.png": b"x", f"{part}/README": b"x"}
        write_zip(tmp_path, part, {**files, **junk})
    assert len(load_omniglot(tmp_path, split="alphabet").class_names) == 11


def fails(root, *parts, **options):
    """The load fails with a one-line DataError that holds every part."""
    with pytest.raises(DataError) as caught:
        load_omniglot(root, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_missing_root_says_where_to_get_it(tmp_path):
    fails(tmp_path / "none", str(tmp_path / "none"), "no such folder", "brendenlake/omniglot", "download=True")


def test_missing_archive_is_named(tiny, tmp_path):
    write_zip(tmp_path, "images_background", tiny["images_background"])
    fails(tmp_path, str(tmp_path), "neither images_evaluation.zip nor", "brendenlake/omniglot")


def test_zip_that_is_none(root):
    (root / "images_evaluation.zip").write_bytes(b"<html>404</html>")
    fails(root, "images_evaluation.zip", "cannot be read as a zip")


def test_zip_cut_short(root):
    file = root / "images_background.zip"
    file.write_bytes(file.read_bytes()[:-500])
    fails(root, "images_background.zip", "cannot be read as a zip")


def test_zip_with_damaged_bytes(root):
    file = root / "images_background.zip"
    data = bytearray(file.read_bytes())
    data[200:220] = bytes(20)  # inside the first member: its checksum no longer holds
    file.write_bytes(data)
    fails(root, "images_background.zip", "cannot be read as a zip", "CRC")


@pytest.mark.parametrize("bad", [b"no image", drawing(0)[:300]])
def test_undecodable_image_is_named(tiny, tmp_path, bad):
    tiny["images_evaluation"]["images_evaluation/A/character02/01.png"] = bad
    for part, files in tiny.items():
        write_zip(tmp_path, part, files)
    fails(
        tmp_path, "images_evaluation.zip: images_evaluation/A/character02/01.png", "cannot be decoded", split="alphabet"
    )


def test_image_of_another_size_is_named(tiny, tmp_path):
    file = io.BytesIO()
    Image.new("L", (28, 20)).save(file, "png")
    tiny["images_evaluation"]["images_evaluation/A/character02/01.png"] = file.getvalue()
    for files in tiny.values():
        write_folder(tmp_path, files)
    fails(tmp_path, "images_evaluation/A/character02/01.png", "found 28x20", "expected 105x105")


def test_wrong_number_of_characters(tiny, root):
    files = {name: data for name, data in tiny["images_evaluation"].items() if "character02" not in name}
    write_zip(root, "images_evaluation", files)
    fails(root, "images_evaluation.zip", "found 2 characters", "expected 3")


def test_wrong_number_of_drawings(tiny, root):
    files = dict(tiny["images_evaluation"])
    del files["images_evaluation/A/character03/02.png"]
    write_zip(root, "images_evaluation", files)
    fails(root, "images_evaluation.zip", "found 1 drawings of A/character03", "expected 2")


def test_unknown_split(root):
    fails(root, "'random'", "shuffled, alphabet", split="random")


def test_download_fetches_what_is_missing(tiny, tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    write_zip(tmp_path, "images_background", tiny["images_background"])
    asked = []

    def fake(root, background, download):
        asked.append((background, download))
        write_folder(Path(root) / "omniglot-py", tiny["images_evaluation"])

    monkeypatch.setattr(torchvision.datasets, "Omniglot", fake)
    assert len(load_omniglot(tmp_path, split="alphabet", download=True).class_names) == 11
    assert asked == [(False, True)]
    load_omniglot(tmp_path, split="alphabet", download=True)
    assert len(asked) == 1


def test_failed_download_says_why(tiny, tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision")

    def fake(root, background, download):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "Omniglot", fake)
    fails(tmp_path, "images_background could not be downloaded", "no route to host", download=True)


def test_download_without_torchvision(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    fails(tmp_path, "pip install torchvision", download=True)


@needs_real
def test_real_archives():
    data = load_omniglot(REAL)
    assert data.images.shape == (32460, 1, 28, 28) and data.images.dtype == torch.uint8
    assert len({name.split("/")[0] for name in data.class_names}) == 50
    assert (
        list(data.class_names) == sorted(data.class_names) and data.class_names[0] == "Alphabet_of_the_Magi/character01"
    )
    assert torch.equal(data.labels.bincount(), torch.full((1623,), 20))
    assert data.images.float().mean() > 200  # paper stays white
    member = "images_evaluation/Angelic/character01/0965_01.png"
    with zipfile.ZipFile(REAL / "images_evaluation.zip") as archive, archive.open(member) as file:
        expected = np.array(Image.open(file).convert("L").resize((28, 28), Image.Resampling.LANCZOS))
    first = data.images[20 * data.class_names.index("Angelic/character01"), 0]
    assert torch.equal(first, torch.from_numpy(expected))


@needs_real
def test_real_alphabets_are_divided_as_lake_did():
    names = {}
    for part, count in omniglot.CHARACTERS.items():
        with zipfile.ZipFile(REAL / f"{part}.zip") as archive:
            names[part] = {"/".join(name.split("/")[1:3]) for name in archive.namelist() if name.endswith(".png")}
        assert len(names[part]) == count
    every = sorted(set.union(*names.values()))
    splits = omniglot.alphabet_split(every, names["images_background"])
    alphabets = {split: {every[i].split("/")[0] for i in indices} for split, indices in splits.items()}
    assert {split: len(found) for split, found in alphabets.items()} == {"train": 25, "val": 5, "test": 20}
    assert {every[i] for i in splits["test"]} == names["images_evaluation"]
    assert alphabets["val"] == {"Arcadian", "Cyrillic", "Grantha", "Sanskrit", "Tagalog"}
