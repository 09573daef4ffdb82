"""Omniglot: 1,623 handwritten characters of 50 alphabets, each drawn by 20 people (Lake et al., Science 350, 2015)."""

from __future__ import annotations

import os
import sys
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from metahpo.checks import check_choice
from metahpo.errors import DataArgumentError, DataError
from metahpo.tasks.arguments import check_archive
from metahpo.tasks.images import decode_image
from metahpo.tasks.labelled import LabelledImages
from metahpo.tasks.pixels import resized

CHARACTERS = {"images_background": 964, "images_evaluation": 659}  # of each archive
DRAWERS = 20
DRAWN, SIZE = 105, 28  # pixels a side, as drawn and as every few-shot paper shrinks it
SHUFFLED_SPLIT = {"train": 1150, "val": 50, "test": 423}
VAL_ALPHABETS = 5
SOURCE = "get it by torchvision's Omniglot(download=True) or from github.com/brendenlake/omniglot (folder python)"

Drawings = dict[
    str, list[tuple[str, bytes]]
]  # of each "ALPHABET/characterNN": the file (for messages) and what it holds


def load_omniglot(root: str | os.PathLike[str], *, split: str = "shuffled", download: bool = False) -> LabelledImages:
    """Omniglot from root, which holds images_background and images_evaluation as zips or as extracted folders.

    torchvision's layout, root/omniglot-py/..., is read alike; a zip is preferred to a folder. images: uint8
    [32460, 1, 28, 28], ink 0 on paper 255, shrunk by Lanczos; classes are named "ALPHABET/characterNN" and sorted by
    that name over both archives, the 20 drawings of a class by file name.

    split="shuffled" mixes the alphabets, as MAML++ does (Antoniou et al. 2019: 1150 train, 50 val, 423 test classes):
    consecutive parts of `numpy.random.RandomState(0).permutation(1623)`. split="alphabet" keeps Lake's division: the
    evaluation archive is test, five of the background alphabets are val (the first five of `RandomState(0).permutation`
    over their sorted names), and the other 25 are train.

    download=True fetches a missing archive by torchvision into root/omniglot-py. Raises DataError, naming the file, if
    an archive is missing, damaged or incomplete, or if an image cannot be decoded.
    """
    check_choice("omniglot", "split", split, ("shuffled", "alphabet"), error=DataArgumentError)
    root = check_archive("omniglot", root, download)
    if download:
        _download_missing(root)
    parts = {part: _read_part(_locate(root, part), part) for part in CHARACTERS}
    drawings = {name: files for found in parts.values() for name, files in found.items()}
    names = sorted(drawings)
    files = [file for name in names for file in drawings[name]]
    images = torch.from_numpy(_shrunk(files))[:, None]
    splits = shuffled_split() if split == "shuffled" else alphabet_split(names, set(parts["images_background"]))
    return LabelledImages(images, torch.arange(len(names)).repeat_interleave(DRAWERS), tuple(names), splits)


def _shrunk(files: Sequence[tuple[str, bytes]]) -> np.ndarray:
    """All drawings, uint8 [M, SIZE, SIZE]. One thread decodes, another shrinks: more would only fight for the GIL."""
    with ThreadPoolExecutor(1) as pool:
        jobs = [pool.submit(_shrink, _decode(files[start : start + 500])) for start in range(0, len(files), 500)]
        return np.concatenate([job.result() for job in jobs])


def _decode(files: Sequence[tuple[str, bytes]]) -> np.ndarray:
    drawings = np.empty((len(files), DRAWN, DRAWN), dtype=np.uint8)
    for drawing, (name, data) in zip(drawings, files, strict=True):
        pixels, _ = decode_image(data, name)
        height, width = pixels.shape[:2]
        if (height, width) != (DRAWN, DRAWN):
            raise DataError(f"{name}: found {width}x{height} pixels, expected {DRAWN}x{DRAWN}")
        drawing[:] = resized(pixels, (DRAWN, DRAWN), 1)[..., 0]
    return drawings


def _shrink(drawings: np.ndarray) -> np.ndarray:
    """Each of [N, H, W] resized to [N, SIZE, SIZE] by Lanczos, to the bit as Pillow's resize of each alone.

    Pillow resizes rows first and columns after, so rows of many drawings can share a call, which halves the time.
    """
    rows = _shrink_rows(drawings).transpose(0, 2, 1)
    return _shrink_rows(np.ascontiguousarray(rows)).transpose(0, 2, 1)


def _shrink_rows(drawings: np.ndarray) -> np.ndarray:
    count, height, width = drawings.shape
    stacked = Image.fromarray(drawings.reshape(count * height, width))
    resized = stacked.resize((SIZE, count * height), Image.Resampling.LANCZOS)
    return np.asarray(resized).reshape(count, height, SIZE)


def shuffled_split() -> dict[str, tuple[int, ...]]:
    """Class indices of each split when alphabets are mixed: consecutive parts of one permutation of all classes."""
    order = np.random.RandomState(0).permutation(sum(SHUFFLED_SPLIT.values())).tolist()
    splits, start = {}, 0
    for name, count in SHUFFLED_SPLIT.items():
        splits[name] = tuple(order[start : start + count])
        start += count
    return splits


def alphabet_split(names: list[str], background: set[str]) -> dict[str, tuple[int, ...]]:
    """Class indices of each split by alphabet; background: which of the names are of the background archive."""
    alphabets = sorted({name.split("/")[0] for name in background})
    val = {alphabets[i] for i in np.random.RandomState(0).permutation(len(alphabets))[:VAL_ALPHABETS]}
    splits: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for index, name in enumerate(names):
        known = "val" if name.split("/")[0] in val else "train"
        splits[known if name in background else "test"].append(index)
    return {split: tuple(indices) for split, indices in splits.items()}


def _find(root: Path, part: str) -> Path | None:
    """The zip or folder of an archive below root, in the official layout or in torchvision's."""
    folders = (root, root / "omniglot-py")
    for path in [folder / f"{part}.zip" for folder in folders] + [folder / part for folder in folders]:
        if path.is_file() if path.suffix else path.is_dir():
            return path
    return None


def _locate(root: Path, part: str) -> Path:
    path = _find(root, part)
    if path is None:
        what = f"neither {part}.zip nor a folder {part}" if root.is_dir() else "no such folder"
        raise DataError(f"{root}: {what}, expected both archives of Omniglot: {SOURCE}")
    return path


def _download_missing(root: Path) -> None:
    missing = [part for part in CHARACTERS if _find(root, part) is None]
    if not missing:
        return
    try:
        from torchvision.datasets import Omniglot
    except ImportError as error:
        raise DataError(
            "downloading Omniglot needs torchvision, which is not installed: "
            f"{sys.executable} -m pip install torchvision"
        ) from error
    for part in missing:
        try:
            Omniglot(root, background=part == "images_background", download=True)
        except (OSError, RuntimeError, zipfile.BadZipFile) as error:
            raise DataError(f"{root}: {part} could not be downloaded ({error}); {SOURCE}") from error


def _read_part(path: Path, part: str) -> Drawings:
    """All drawings of an archive, those of a character sorted by file name, after a check that none is missing."""
    drawings: Drawings = {}
    read = _read_zip(path) if path.suffix else _read_folder(path)
    for member, data in sorted(read):
        pieces = member.split("/")
        if len(pieces) == 4 and pieces[0] == part and not pieces[3].startswith("."):
            drawings.setdefault(f"{pieces[1]}/{pieces[2]}", []).append((f"{path}: {member}", data))
    if len(drawings) != CHARACTERS[part]:
        raise DataError(
            f"{path}: found {len(drawings)} characters ({part}/ALPHABET/characterNN/*.png), expected {CHARACTERS[part]}"
        )
    for name, files in drawings.items():
        if len(files) != DRAWERS:
            raise DataError(f"{path}: found {len(files)} drawings of {name}, expected {DRAWERS}")
    return drawings


def _read_zip(path: Path) -> list[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".png")]
            return [(info.filename, archive.read(info)) for info in members]
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path}: cannot be read as a zip ({error}), expected the whole archive: {SOURCE}") from error


def _read_folder(path: Path) -> Iterable[tuple[str, bytes]]:
    for file in path.glob("*/*/*.png"):
        yield file.relative_to(path.parent).as_posix(), file.read_bytes()
