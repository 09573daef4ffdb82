"""Labelled images held in memory, with the classes of each split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from metahpo.errors import DataError


@dataclass(frozen=True)
class LabelledImages:
    """Images of many classes, and which classes belong to which split.

    images: uint8 [M, C, H, W], sorted by class or not; labels: int64 [M], the class index of each image;
    class_names: name of class i at position i; splits: class indices by split name ("train", "val", "test"), disjoint.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    splits: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        """Raises DataError if a class is in two splits, where test images would leak into training, or twice in one."""
        where: dict[int, str] = {}
        for split, classes in self.splits.items():
            for c in classes:
                if c in where:
                    raise DataError(f"class {self.class_names[c]!r} is in split {where[c]!r} and again in {split!r}")
                where[c] = split
