"""Any map-style dataset of labelled images, read into memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from metahpo.errors import DataError
from metahpo.tasks.labelled import LabelledImages


def labelled(dataset: Dataset, classes: Mapping[str, Sequence[int]]) -> LabelledImages:
    """Reads a map-style dataset of (image, label) into memory; classes: the labels of each split.

    Raises DataError for an empty dataset, and for the first image that is neither PIL nor uint8 [C, H, W] or differs in
    size.
    """
    pairs = [dataset[index] for index in range(len(dataset))]  # type: ignore[arg-type]
    if not pairs:
        raise DataError("the dataset is empty")
    images = [_as_uint8(image, index) for index, (image, _) in enumerate(pairs)]
    for index, image in enumerate(images):
        if image.shape != images[0].shape:
            raise DataError(f"item {index} of the dataset is {list(image.shape)}, item 0 {list(images[0].shape)}")
    labels = torch.tensor([int(label) for _, label in pairs])
    count = max(int(labels.max()), *(max(c) for c in classes.values() if len(c))) + 1
    splits = {split: tuple(int(c) for c in members) for split, members in classes.items()}
    return LabelledImages(torch.stack(images), labels, tuple(str(i) for i in range(count)), splits)


def _as_uint8(image: object, index: int) -> Tensor:
    """A PIL image (grey or made RGB) or a uint8 tensor [C, H, W] as the latter."""
    if isinstance(image, Image.Image):
        pixels = torch.as_tensor(np.array(image.convert("L" if image.mode in ("1", "L") else "RGB")))
        return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.dim() == 3:
        return image
    found = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
    raise DataError(f"item {index} of the dataset is {found}; expected a PIL image or uint8 [C, H, W]")
