"""Labelled images held in memory, with the classes of each split."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metahpo.checks import check_type, check_whole, refuse
from metahpo.errors import DataArgumentError
from metahpo.tasks.copies import alike
from metahpo.tasks.pixels import net_images

MOST_CLASSES = 10_000_000


@dataclass(frozen=True)
class LabelledImages:
    """Images of many classes, and which classes belong to which split.

    images: uint8 [M, C, H, W], sorted by class or not, or float32, which a net sees as they are (0..1, or normalised);
    other types become one of the two (``net_images``). labels: int64 [M], the class index of each image;
    class_names: name of class i at position i; splits: class indices by split name ("train", "val", "test"), disjoint.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    splits: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        """Raises DataArgumentError for images or labels of other kinds, for labels without a class, and if a class is
        in two splits, where test images would leak into training, or twice in one."""
        images, labels = _tensor("images", self.images), _tensor("labels", self.labels)
        if images.dim() != 4:
            refuse(self, "images", images, "[M, C, H, W]", DataArgumentError)
        if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.is_complex():
            expected = f"whole numbers [{len(images)}], one for each image"
            refuse(self, "labels", f"{labels.dtype} {list(labels.shape)}", expected, DataArgumentError)
        names = tuple(check_type(self, "class_names", self.class_names, (tuple, list), error=DataArgumentError))
        labels = labels.to(torch.int64)
        if len(labels):
            for label in torch.stack(torch.aminmax(labels)).tolist():
                if not 0 <= label < len(names):
                    expected = f"0 to {len(names) - 1}, each that of one of the {len(names)} class names"
                    refuse(self, "labels", label, expected, DataArgumentError)
        object.__setattr__(self, "images", net_images(images, "LabelledImages: images"))
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "class_names", names)
        check_type(self, "splits", self.splits, Mapping, "a mapping from split to classes", error=DataArgumentError)
        where: dict[int, str] = {}
        for split, classes in self.splits.items():
            for c in classes:
                if type(c) is not int or c < 0:  # Plain ones, of which there are thousands, are not looked at further.
                    c = check_whole(self, f"splits: a class of {split!r}", c, at_least=0, error=DataArgumentError)
                if c in where:
                    name = names[c] if c < len(names) else str(c)
                    raise DataArgumentError(f"class {name!r} is in split {where[c]!r} and again in {split!r}")
                where[c] = split

    def warn_if_alike(self) -> None:
        """Warns once, in a line, of classes whose images are all the same."""
        if self.__dict__.get("_looked_at"):
            return
        object.__setattr__(self, "_looked_at", True)
        if what := alike(self.images, self.labels.cpu().numpy(), self.class_names):
            warnings.warn(f"{what}; are they decoded and labelled rightly?", stacklevel=3)


def _tensor(name: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value)
    except (TypeError, ValueError, RuntimeError):
        refuse(LabelledImages, name, value, "a tensor or an array", DataArgumentError)
