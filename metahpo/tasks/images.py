"""Images from files: a folder of class folders per split, and the decoding that other image data sets share."""

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

SPLITS = ("train", "val", "test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
MODES = {1: "L", 3: "RGB"}


def load_image_folder(root: str | os.PathLike[str], *, size: int, channels: int = 3) -> LabelledImages:
    """Images laid out as root/{train,val,test}/CLASS/FILE, with FILE a png, jpg, jpeg, bmp or webp.

    images: uint8 [M, channels, size, size] in 0..255, sorted by split, class and file name; channels is 1 (grey) or 3
    (RGB), and images of another shape are resized (Lanczos) to size x size pixels. Class names are "SPLIT/CLASS": a
    folder name met in two splits makes two classes. Hidden files and files of other kinds are passed over.
    Raises DataError, naming the path, if root, a split or a split's classes are missing, if a class folder holds no
    image or if a file cannot be decoded.
    """
    if channels not in MODES or size < 1:
        raise DataError(
            f"image folder: found channels={channels} and size={size}, expected 1 or 3 channels and size >= 1"
        )
    files, labels, names = [], [], []
    splits = {}
    for split in SPLITS:
        folders = _class_folders(Path(root), split)
        splits[split] = tuple(range(len(names), len(names) + len(folders)))
        for folder in folders:
            found = _image_files(folder)
            files += found
            labels += [len(names)] * len(found)
            names.append(f"{split}/{folder.name}")
    images = _read_all(files, size, channels)
    return LabelledImages(images, torch.tensor(labels), tuple(names), splits)


def _class_folders(root: Path, split: str) -> list[Path]:
    """The class folders of a split, sorted by name; DataError if there are none."""
    layout = "expected root/{train,val,test}/CLASS/*.png (or jpg, jpeg, bmp, webp)"
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
