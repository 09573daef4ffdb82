"""Any map-style dataset of labelled images, read into memory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from metahpo.checks import check_choice, check_number, check_type, check_whole, refuse
from metahpo.errors import DataArgumentError, DataError, did_you_mean, one_line
from metahpo.tasks.copies import digest, warn_of_copies
from metahpo.tasks.labelled import MOST_CLASSES, LabelledImages
from metahpo.tasks.pixels import MODES, net_images, picture_pixels, resized, several_frames


def labelled(
    dataset: Dataset,
    classes: Mapping[str, Sequence[int | str]] | None = None,
    *,
    size: int | None = None,
    channels: int | None = None,
    fractions: Sequence[float] = (0.64, 0.16, 0.2),
    seed: int = 0,
) -> LabelledImages:
    """Reads a map-style dataset of (image, label) into memory.

    An image is a Pillow one of any mode, an array [H, W] or [H, W, C], or a tensor [C, H, W]: uint8, or of another type
    as ``LabelledImages`` takes it, all of one type. Pictures are turned as their EXIF tag says, and laid on white where
    they are transparent.

    classes: the labels (or names) of each split; None divides all labels, mixed by ``seed``, into train, val and test
    by ``fractions``. size, channels: images of another are resized (Lanczos) to size x size pixels, and made grey (1)
    or RGB (3); None leaves them, and then all must be alike. Classes are named as by the dataset's ``classes``, or by
    its ``class_to_idx``, if it (or the one that it is a ``Subset`` of) has them, else by number.
    Warns, in a line, of images that are in two splits.
    Raises DataError for an empty dataset, for the first item that is no such pair or whose image differs in size, and
    for classes that the dataset does not have.
    """
    length = _length(dataset)
    size = None if size is None else check_whole("labelled", "size", size, at_least=1, error=DataArgumentError)
    check_choice("labelled", "channels", channels, (None, *MODES), error=DataArgumentError)
    images, labels, frames = [], [], 0
    for index in range(length):
        image, label = _item(dataset, index)
        frames += several_frames(image)
        images.append(_sized(_planes(image, index), size, channels, index))
        labels.append(label)
        first = images[0]
        if images[-1].shape != first.shape:
            raise DataError(
                f"item {index} of the dataset is {list(images[-1].shape)}, item 0 {list(first.shape)}; "
                "give a size and channels to make them alike"
            )
        if images[-1].dtype != first.dtype:
            raise DataError(
                f"item {index} of the dataset is {images[-1].dtype}, item 0 {first.dtype}; expected one type for all"
            )
    if not images:
        raise DataError("the dataset is empty, expected at least one (image, label)")
    if frames:
        warnings.warn(f"{frames} images of the dataset hold several frames, of which one is taken", stacklevel=2)
    names = class_names(dataset, max(labels) + 1)
    splits = divided(sorted(set(labels)), fractions, seed) if classes is None else _numbered(classes, names)
    names += tuple(map(str, range(len(names), max((c + 1 for chosen in splits.values() for c in chosen), default=0))))
    where = {c: split for split, chosen in splits.items() for c in chosen}
    used = [i for i, label in enumerate(labels) if label in where]
    warn_of_copies(
        [digest(images[i].contiguous().view(torch.uint8).numpy()) for i in used],
        [where[labels[i]] for i in used],
        [f"item {i}" for i in used],
    )
    return LabelledImages(net_images(torch.stack(images), "the dataset's images"), torch.tensor(labels), names, splits)


def divided(classes: Sequence[int], fractions: Sequence[float], seed: int) -> dict[str, tuple[int, ...]]:
    """The classes, mixed by ``seed``, in parts of these fractions (whose sum is 1): train, val and test."""
    parts = fractions if isinstance(fractions, Sequence) and not isinstance(fractions, str) else ()
    parts = [check_number("labelled", "fractions", p, at_least=0, error=DataArgumentError) for p in parts]
    if len(parts) != 3 or not math.isclose(sum(parts), 1, abs_tol=1e-6):
        refuse("labelled", "fractions", fractions, "three numbers with the sum 1", DataArgumentError)
    seed = check_whole("labelled", "seed", seed, at_least=0, error=DataArgumentError)
    mixed = np.random.default_rng(seed).permutation(np.array(classes)).tolist()
    ends = [round(len(mixed) * math.fsum(parts[:part])) for part in range(len(parts) + 1)]
    return {s: tuple(mixed[a:b]) for s, a, b in zip(("train", "val", "test"), ends, ends[1:])}


def _item(dataset: Dataset, index: int) -> tuple[Any, int]:
    try:
        image, label = dataset[index]
    except (TypeError, ValueError) as error:
        raise DataError(f"item {index} of the dataset is no (image, label): {one_line(error)}") from error
    try:
        # NumPy's and torch's too.
        number = int(label) if isinstance(label, bool) else check_whole("", "", label)
    except ValueError:
        number = -1
    if not 0 <= number < MOST_CLASSES:
        raise DataError(f"item {index} of the dataset has the label {label!r:.40}, expected a whole number from 0 on")
    return image, number


def _length(dataset: Any) -> int:
    try:
        return len(dataset)
    except TypeError:
        expected = "a map-style Dataset of (image, label), with a length"
        refuse("labelled", "dataset", dataset, expected, DataArgumentError)


def class_names(dataset: Any, count: int) -> tuple[str, ...]:
    """The names of at least ``count`` classes: the dataset's own or, where it has none, their numbers."""
    names: dict[int, str] = {}
    listed, numbers = getattr(dataset, "classes", None), getattr(dataset, "class_to_idx", None)
    if isinstance(listed, (list, tuple, np.ndarray)):
        names = dict(enumerate(map(str, listed)))
    elif isinstance(numbers, Mapping):
        names = {number: str(name) for name, number in numbers.items() if isinstance(number, int)}
    elif isinstance(inner := getattr(dataset, "dataset", None), Dataset):
        return class_names(inner, count)
    count = max([count, *(number + 1 for number in names)])
    return tuple(names.get(number, str(number)) for number in range(count))


def _numbered(classes: Any, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The classes of each split by number, whether given by number or name."""
    check_type("labelled", "classes", classes, Mapping, "a mapping from split to labels", error=DataArgumentError)
    splits = {}
    for split, chosen in classes.items():
        if isinstance(chosen, str) or not isinstance(chosen, Iterable):
            refuse("labelled", f"classes of {split!r}", chosen, "a sequence of labels or names", DataArgumentError)
        splits[split] = tuple(_number(c, names, split) for c in chosen)
    return splits


def _number(label: Any, names: tuple[str, ...], split: str) -> int:
    if isinstance(label, str):
        if label not in names:
            raise DataArgumentError(
                f"labelled: classes of {split!r}: the dataset has no class {label!r}; {did_you_mean(label, names)}"
            )
        return names.index(label)
    most = MOST_CLASSES - 1
    return check_whole("labelled", f"classes of {split!r}", label, at_least=0, at_most=most, error=DataArgumentError)


def _planes(image: Any, index: int) -> Tensor:
    """An image of any kind as [C, H, W], in its own type."""
    if isinstance(image, Image.Image):
        return _first(picture_pixels(image))
    if isinstance(image, Tensor) and image.dim() == 3 and not _channels_last(image.shape):
        return image.detach().cpu()
    if isinstance(image, np.ndarray) and image.ndim in (2, 3) and image.dtype.kind in "buif":
        if image.ndim == 3 and image.shape[-1] in (2, 4) and image.dtype == np.uint8:
            # Grey or colour with transparency.
            return _first(picture_pixels(Image.fromarray(image)))
        first = image.ndim == 3 and image.shape[-1] not in (1, 3) and image.shape[0] in (1, 3)
        native = image.astype(np.float64 if image.dtype.itemsize > 8 else image.dtype.newbyteorder("="))
        return torch.from_numpy(native) if first else _first(native)
    found = f"{image.dtype} {list(image.shape)}" if isinstance(image, (Tensor, np.ndarray)) else type(image).__name__
    raise DataError(
        f"item {index} of the dataset is {found}; expected a PIL image or uint8 [C, H, W], "
        "or an array [H, W] or [H, W, C]"
    )


def _channels_last(shape: Sequence[int]) -> bool:
    return shape[-1] in (1, 3, 4) and shape[0] > 4


def _sized(image: Tensor, size: int | None, channels: int | None, index: int) -> Tensor:
    found, height, width = image.shape
    side = (size or width, size or height)
    if (found, width, height) == (channels or found, *side):
        return image
    if found not in MODES:
        raise DataError(f"item {index} of the dataset: an image of {found} channels cannot be resized, expected 1 or 3")
    values = image if image.dtype != torch.bool else image.to(torch.uint8) * 255
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    pixels = values.permute(1, 2, 0).numpy()
    return _first(resized(pixels[..., 0] if found == 1 else pixels, side, channels or found))


def _first(pixels: np.ndarray) -> Tensor:
    """Pixels [H, W] or [H, W, C] as [C, H, W]."""
    planes = torch.from_numpy(np.ascontiguousarray(pixels))
    return planes[None] if planes.dim() == 2 else planes.permute(2, 0, 1).contiguous()
