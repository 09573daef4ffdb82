"""Images from files: class folders, or tables of file names and labels, and the decoding that other sets share."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from metahpo.errors import DataError
from metahpo.tasks.labelled import LabelledImages
from metahpo.tasks.tables import read_table

SPLITS = ("train", "val", "test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
MODES = {1: "L", 3: "RGB"}

Classes = dict[str, dict[str, list[Path]]]  # The files of each class of each split.


def load_image_folder(root: str | os.PathLike[str], *, size: int, channels: int = 3) -> LabelledImages:
    """Images laid out as root/{train,val,test}/CLASS/FILE, with FILE a png, jpg, jpeg, bmp or webp, or all together in
    root/images with the tables root/{train,val,test}.csv, as mini-ImageNet is shared (Ravi and Larochelle 2017): a
    header "filename,label", then a row an image. A root with train.csv is read as the latter.

    images: uint8 [M, channels, size, size] in 0..255, sorted by split, class and file name; channels is 1 (grey) or 3
    (RGB), and images of another shape are resized (Lanczos) to size x size pixels. Class names are "SPLIT/CLASS": a
    folder name met in two splits makes two classes, a label in two tables is refused. Hidden files and files of other
    kinds are passed over in folders.
    Raises DataError, naming the path (and row), if root, a split or a split's classes are missing, if a class folder
    holds no image, if a table is not as above or names a file that is not there or named already, or if a file cannot
    be decoded.
    """
    if channels not in MODES or size < 1:
        raise DataError(
            f"image folder: found channels={channels} and size={size}, expected 1 or 3 channels and size >= 1"
        )
    classes = _tables(Path(root)) if (Path(root) / f"{SPLITS[0]}.csv").is_file() else _folders(Path(root))
    files = [file for split in SPLITS for found in classes[split].values() for file in found]
    sizes = [len(found) for split in SPLITS for found in classes[split].values()]
    names = tuple(f"{split}/{name}" for split in SPLITS for name in classes[split])
    labels = torch.arange(len(names)).repeat_interleave(torch.tensor(sizes))
    splits = {split: tuple(i for i, name in enumerate(names) if name.startswith(f"{split}/")) for split in SPLITS}
    return LabelledImages(_read_all(files, size, channels), labels, names, splits)


def _tables(root: Path) -> Classes:
    """The files of each class of each split, from tables."""
    splits: Classes = {}
    rows: dict[str, str] = {}  # Where a file or label was met first.
    for split in SPLITS:
        found: dict[str, list[Path]] = {}
        for place, filename, label in read_table(root / f"{split}.csv"):
            file = root / "images" / filename
            if filename in rows:
                raise DataError(f"{place}: {filename!r} is in {rows[filename]} already")
            if not file.is_file():
                raise DataError(f"{place}: {file}: no such file")
            for other, classes in splits.items():
                if label in classes:
                    raise DataError(f"{place}: label {label!r} is a class of {other}.csv already")
            rows[filename] = place
            found.setdefault(label, []).append(file)
        splits[split] = {name: sorted(found[name]) for name in sorted(found)}
    return splits


def _folders(root: Path) -> Classes:
    """The files of each class of each split, from folders."""
    return {split: {folder.name: _image_files(folder) for folder in _class_folders(root, split)} for split in SPLITS}


def _class_folders(root: Path, split: str) -> list[Path]:
    """The class folders of a split, sorted by name; DataError if there are none."""
    layout = "expected root/{train,val,test}/CLASS/*.png (or jpg, jpeg, bmp, webp), or root/{train,val,test}.csv"
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; {layout}")
    if not (root / split).is_dir():
        raise DataError(f"{root / split}: no such folder; {layout}")
    folders = sorted(path for path in (root / split).iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise DataError(f"{root / split}: found no class folder; {layout}")
    return folders


def _image_files(folder: Path) -> list[Path]:
    """The images of a class folder, sorted by name; DataError if there are none."""
    files = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    found = sorted(path for path in files if path.is_file())
    if not found:
        raise DataError(f"{folder}: found no image, expected at least one of {', '.join(SUFFIXES)}")
    return found


def decode_image(data: bytes, name: str, mode: str) -> Image.Image:
    """The image that a file holds, in mode "L" or "RGB"; DataError with the given name if Pillow cannot read it."""
    try:
        with Image.open(BytesIO(data)) as image:
            return image.convert(mode)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        # Pillow quotes the BytesIO's address when it knows no format: nothing that a reader could use.
        reason = "no known image format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{name}: cannot be decoded ({reason}), expected an image") from error


def _read_all(files: list[Path], size: int, channels: int) -> Tensor:
    """All files, uint8 [M, channels, size, size]; a few threads, as Pillow lets go of the GIL where it works hard."""
    images = np.empty((len(files), size, size, channels), dtype=np.uint8)

    def fill(index: int) -> None:
        file = files[index]
        image = decode_image(file.read_bytes(), str(file), MODES[channels])
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        images[index] = np.asarray(image).reshape(size, size, channels)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, range(len(files))))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
