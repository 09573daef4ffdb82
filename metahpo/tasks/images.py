"""Images from files: class folders, or tables of file names and labels, and the decoding that other sets share."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from metahpo.checks import check_choice, check_type, check_whole
from metahpo.errors import DataArgumentError, DataError, one_line, shown
from metahpo.tasks.copies import digest, refuse_same_file, warn_of_copies
from metahpo.tasks.labelled import LabelledImages
from metahpo.tasks.pixels import MODES, picture_pixels, resized, scale_of, several_frames
from metahpo.tasks.tables import read_table

SPLITS = ("train", "val", "test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")

Classes = dict[str, dict[str, list[Path]]]  # The files of each class of each split.


def load_image_folder(root: str | os.PathLike[str], *, size: int, channels: int = 3) -> LabelledImages:
    """Images laid out as root/{train,val,test}/CLASS/FILE, with FILE a png, jpg, jpeg, bmp, webp, tif or tiff, or all
    together in root/images with the tables root/{train,val,test}.csv, as mini-ImageNet is shared (Ravi and Larochelle
    2017): a header "filename,label", then a row an image. A root with train.csv is read as the latter.

    images: uint8 [M, channels, size, size] in 0..255, sorted by split, class and file name; channels is 1 (grey) or 3
    (RGB), and images of another shape are resized (Lanczos) to size x size pixels. Pictures are turned as their EXIF
    tag says, and laid on white where they are transparent; 65535 is white in 16 bits; files of floats or 32 bits may
    hold 0..1, 0..255 or whole numbers to 65535, all of them alike. Class names are "SPLIT/CLASS": a folder name met in
    two splits makes two classes, a label in two tables is refused. Hidden files and files of other kinds are passed
    over in folders. Warns, in a line, of files whose content is in two splits, and of those with several frames, of
    which the first is taken.
    Raises DataError, naming the path (and row), if root, a split or a split's classes are missing, if a class folder
    holds no image, if a table is not as above or names a file that is not there, if a file is there twice (by whatever
    path or link), or if one cannot be decoded.
    """
    try:
        size = check_whole("", "size", size, at_least=1)
        channels = check_whole("", "channels", channels)
        check_choice("", "channels", channels, MODES)
    except ValueError:
        raise DataArgumentError(
            f"image folder: found channels={shown(channels)} and size={shown(size)}, expected 1 or 3 channels and "
            "size >= 1"
        ) from None
    check_type("image folder", "root", root, (str, os.PathLike), "a path", error=DataArgumentError)
    classes = _tables(Path(root)) if (Path(root) / f"{SPLITS[0]}.csv").is_file() else _folders(Path(root))
    files = [(file, split) for split in SPLITS for found in classes[split].values() for file in found]
    sizes = [len(found) for split in SPLITS for found in classes[split].values()]
    names = tuple(f"{split}/{name}" for split in SPLITS for name in classes[split])
    labels = torch.arange(len(names)).repeat_interleave(torch.tensor(sizes))
    splits = {split: tuple(i for i, name in enumerate(names) if name.startswith(f"{split}/")) for split in SPLITS}
    images, digests = _read_all([file for file, _ in files], size, channels)
    warn_of_copies(digests, [split for _, split in files], [str(file) for file, _ in files])
    return LabelledImages(images, labels, names, splits)


def _tables(root: Path) -> Classes:
    """The files of each class of each split, from tables."""
    splits: Classes = {}
    rows: list[tuple[Path, str]] = []
    for split in SPLITS:
        found: dict[str, list[Path]] = {}
        for place, filename, label in read_table(root / f"{split}.csv"):
            file = root / "images" / filename
            if not file.is_file():
                raise DataError(f"{place}: {file}: no such file")
            for other, classes in splits.items():
                if label in classes:
                    raise DataError(f"{place}: label {label!r} is a class of {other}.csv already")
            rows.append((file, f"{place}: {filename!r}"))
            found.setdefault(label, []).append(file)
        splits[split] = {name: sorted(found[name]) for name in sorted(found)}
    refuse_same_file(rows)
    return splits


def _folders(root: Path) -> Classes:
    """The files of each class of each split, from folders."""
    splits = {split: {folder.name: _image_files(folder) for folder in _class_folders(root, split)} for split in SPLITS}
    refuse_same_file((file, str(file)) for classes in splits.values() for files in classes.values() for file in files)
    return splits


def _class_folders(root: Path, split: str) -> list[Path]:
    """The class folders of a split, sorted by name; DataError if there are none."""
    layout = "expected root/{train,val,test}/CLASS/*.png (or jpg, jpeg, bmp, webp, tif), or root/{train,val,test}.csv"
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


def decode_image(data: bytes, name: str) -> tuple[np.ndarray, bool]:
    """The pixels of an image file (``picture_pixels``), and whether it holds more frames than this first one.

    Raises DataError with the given name if Pillow cannot read it.
    """
    try:
        with Image.open(BytesIO(data)) as image:
            several = several_frames(image)
            image.seek(0)
            return picture_pixels(image), several
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        # Pillow quotes the BytesIO's address when it knows no format: nothing that a reader could use.
        reason = "no known image format" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise DataError(f"{name}: cannot be decoded ({reason}), expected an image") from error


def _read_all(files: list[Path], size: int, channels: int) -> tuple[Tensor, list[bytes]]:
    """All files, uint8 [M, channels, size, size], and a digest of each; a few threads, as Pillow lets go of the GIL
    where it works hard."""
    images = np.empty((len(files), size, size, channels), dtype=np.uint8)
    digests = [b""] * len(files)
    deep: dict[int, Deep] = {}
    frames: list[Path] = []

    def fill(index: int) -> None:
        file = files[index]
        data = _content(file)
        digests[index] = digest(data)
        pixels, several = decode_image(data, str(file))
        if several:
            frames.append(file)
        small = resized(pixels, (size, size), channels)
        if pixels.dtype == np.uint8:
            images[index] = small
        else:
            deep[index] = Deep(small, pixels)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, range(len(files))))
    if frames:
        warnings.warn(
            f"{len(frames)} image files hold several frames, of which the first is taken, such as {min(frames)}",
            stacklevel=3,
        )
    _scale_deep(images, deep, files)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), digests


class Deep:
    """An image of floats or of 32 bits, resized, until the range of all such images is known."""

    def __init__(self, small: np.ndarray, pixels: np.ndarray):
        self.small = small
        self.low, self.high = float(pixels.min()), float(pixels.max())
        self.floats = bool(np.issubdtype(pixels.dtype, np.floating))
        self.whole = not self.floats or bool((pixels == np.rint(pixels)).all())


def _scale_deep(images: np.ndarray, deep: dict[int, Deep], files: list[Path]) -> None:
    """Puts the deep images among the others, floats and whole numbers each by the range of all of them."""
    for floats in (True, False):
        group = {index: image for index, image in sorted(deep.items()) if image.floats == floats}
        if not group:
            continue
        low = float(np.min([image.low for image in group.values()]))
        high = float(np.max([image.high for image in group.values()]))
        whole = all(image.whole for image in group.values()) and not (floats and high <= 1)
        odd = next((i for i, image in group.items() if image.low == low or image.high == high), 0)
        worst = next((i for i, image in group.items() if not (image.low >= 0 and image.high <= 65535)), odd)
        factor = scale_of(low, high, whole, str(files[worst]))
        for index, image in group.items():
            images[index] = np.rint(image.small * factor).clip(0, 255).astype(np.uint8)


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}), expected an image") from None
