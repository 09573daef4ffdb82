"""Any map-style dataset of labelled images, read into memory."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from metahpo.errors import DataError, one_line
from metahpo.tasks.labelled import LabelledImages


def labelled(
    dataset: Dataset,
    classes: Mapping[str, Sequence[int]] | None = None,
    *,
    size: int | None = None,
    channels: int | None = None,
    fractions: Sequence[float] = (0.64, 0.16, 0.2),
    seed: int = 0,
) -> LabelledImages:
    """Reads a map-style dataset of (image, label) into memory, an image PIL or uint8 [C, H, W].

    classes: the labels of each split; None divides all labels, mixed by ``seed``, into train, val and test by
    ``fractions``. size, channels: images of another are resized (Lanczos) to size x size pixels, and made grey (1) or
    RGB (3); None leaves them, and then all must be alike. Classes are named as by the dataset's ``classes``, if it has
    such a list, else by number.
    Raises DataError for an empty dataset, and for the first item that is no such pair or whose image differs in size.
    """
    images, labels = [], []
    for index in range(len(dataset)):  # type: ignore[arg-type]
        image, label = _item(dataset, index)
        images.append(_resized(_as_uint8(image, index), size, channels))
        labels.append(label)
        if images[-1].shape != images[0].shape:
            raise DataError(
                f"item {index} of the dataset is {list(images[-1].shape)}, item 0 {list(images[0].shape)}; "
                "give a size and channels to make them alike"
            )
    if not images:
        raise DataError("the dataset is empty")
    splits = divided(sorted(set(labels)), fractions, seed) if classes is None else classes
    count = max(max(labels), *(max(c) for c in splits.values() if len(c))) + 1
    members = {split: tuple(int(c) for c in chosen) for split, chosen in splits.items()}
    return LabelledImages(torch.stack(images), torch.tensor(labels), _names(dataset, count), members)


def divided(classes: Sequence[int], fractions: Sequence[float], seed: int) -> dict[str, tuple[int, ...]]:
    """The classes, mixed by ``seed``, in parts of these fractions (whose sum is 1): train, val and test."""
    mixed = np.random.default_rng(seed).permutation(np.array(classes)).tolist()
    ends = [round(len(mixed) * math.fsum(fractions[:part])) for part in range(len(fractions) + 1)]
    return {s: tuple(mixed[a:b]) for s, a, b in zip(("train", "val", "test"), ends, ends[1:])}


def _item(dataset: Dataset, index: int) -> tuple[Any, int]:
    try:
        image, label = dataset[index]
    except (TypeError, ValueError) as error:
        raise DataError(f"item {index} of the dataset is no (image, label): {one_line(error)}") from error
    try:
        number = operator.index(label)  # Of NumPy's and torch's whole numbers too.
    except TypeError:
        number = -1
    if number < 0:
        raise DataError(f"item {index} of the dataset has the label {label!r:.40}, expected a whole number from 0 on")
    return image, number


def _names(dataset: Dataset, count: int) -> tuple[str, ...]:
    names = getattr(dataset, "classes", None)
    if isinstance(names, (list, tuple)) and len(names) >= count:
        return tuple(map(str, names))
    return tuple(str(i) for i in range(count))


def _as_uint8(image: object, index: int) -> Tensor:
    """A PIL image (grey or made RGB) or a uint8 tensor [C, H, W] as the latter."""
    if isinstance(image, Image.Image):
        return _pixels(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.dim() == 3:
        return image
    found = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
    raise DataError(f"item {index} of the dataset is {found}; expected a PIL image or uint8 [C, H, W]")


def _resized(image: Tensor, size: int | None, channels: int | None) -> Tensor:
    found, height, width = image.shape
    side = (size or width, size or height)
    if (found, width, height) == (channels or found, *side):
        return image
    if found not in (1, 3):
        raise DataError(f"an image of {found} channels cannot be resized, expected 1 or 3")
    picture = Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy())
    picture = picture.convert({1: "L", 3: "RGB"}[channels or found])
    return _pixels(picture.resize(side, Image.Resampling.LANCZOS) if picture.size != side else picture)


def _pixels(image: Image.Image) -> Tensor:
    """A grey or RGB image as uint8 [C, H, W]."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()
