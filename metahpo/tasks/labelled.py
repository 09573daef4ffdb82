"""Labelled images held in memory, with the classes of each split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


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
