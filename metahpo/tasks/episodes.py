"""N-way K-shot tasks from any labelled data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal
from zlib import crc32

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from metahpo.errors import DataError
from metahpo.tasks.labelled import LabelledImages
from metahpo.tasks.task import Task


class Episodes:
    """Numbered few-shot tasks (Vinyals et al. 2016, section 4): task i is a pure function of (seed, split, i).

    Each task draws ``ways`` classes of the split and, of each, ``shots`` support and ``queries`` query images, all
    different. Images come as float32 [N, C, H, W] in 0..1, labels as int64 0..ways-1; sets are ordered by class.
    labels: "task" for those, or "class" for a class's place among the split's, 0..``classes``-1, the same in all tasks.
    rotate: each class of a task is turned by a random multiple of 90 degrees (the augmentation of Santoro et al. 2016;
    square images).

    Images stay uint8 on ``device`` until a batch is drawn; a batch is assembled without a loop over images.
    """

    def __init__(
        self,
        data: LabelledImages,
        split: str,
        *,
        ways: int,
        shots: int,
        queries: int,
        seed: int = 0,
        rotate: bool = False,
        labels: Literal["task", "class"] = "task",
        device: torch.device | str = "cpu",
    ):
        if split not in data.splits:
            raise DataError(f"the data has no split {split!r}; it has {', '.join(data.splits)}")
        classes = np.asarray(data.splits[split])
        if len(classes) < ways:
            raise DataError(f"split {split!r} has {len(classes)} classes, fewer than the {ways} ways of a task")
        of_images = data.labels.cpu().numpy()
        order = np.argsort(of_images, kind="stable")
        counts = np.bincount(of_images, minlength=len(data.class_names))
        need, short = shots + queries, [c for c in classes if counts[c] < shots + queries]
        if short:
            name, count = data.class_names[short[0]], counts[short[0]]
            more = f" (and {len(short) - 1} more such classes)" if len(short) > 1 else ""
            raise DataError(
                f"class {name!r} of split {split!r} has {count} images; "
                f"a task needs {need} ({shots} shots + {queries} queries){more}"
            )
        if rotate and data.images.shape[-1] != data.images.shape[-2]:
            raise DataError(f"rotate needs square images, found {tuple(data.images.shape[-2:])}")
        self.ways, self.shots, self.queries, self.seed, self.split, self.rotate = (
            ways,
            shots,
            queries,
            seed,
            split,
            rotate,
        )
        self.class_names, self.labels = data.class_names, labels
        self._images = data.images.to(device)
        self._classes, self._counts = classes, counts
        self._order, self._first = order, np.concatenate([[0], np.cumsum(counts)[:-1]])
        self._most = int(counts[classes].max())

    @classmethod
    def from_dataset(cls, dataset: Dataset, classes: Mapping[str, Sequence[int]], split: str, **settings) -> Episodes:
        """Episodes over a map-style dataset of (image, label), PIL or uint8 [C, H, W]; classes: labels by split."""
        return cls(labelled(dataset, classes), split, **settings)

    def task(self, index: int) -> Task:
        return self.batch([index]).select(0)

    def batch(self, indices: Sequence[int]) -> Task:
        draws = [self._draw(index) for index in indices]
        rows, turns, classes = (torch.as_tensor(np.stack(parts)) for parts in zip(*draws))
        images = self._images[rows.to(self._images.device)]  # [T, ways, shots + queries, C, H, W]
        if self.rotate:
            images = _turned(images, turns.to(images.device))
        images = images.to(torch.float32).div_(255)
        support, query = images.split([self.shots, self.queries], dim=2)
        labels = classes if self.labels == "class" else torch.arange(self.ways).expand(len(draws), self.ways)
        labels = labels.to(images.device)
        return Task(
            support.flatten(1, 2),
            labels.repeat_interleave(self.shots, 1),
            query.flatten(1, 2),
            labels.repeat_interleave(self.queries, 1),
        )

    @property
    def classes(self) -> int:
        """How many classes the split has."""
        return len(self._classes)

    def _draw(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The image numbers [ways, shots + queries] of a task, its quarter turns and its classes' places [ways]."""
        rng = np.random.default_rng([self.seed, crc32(self.split.encode()), index])
        places = rng.choice(len(self._classes), self.ways, replace=False)
        classes = self._classes[places]
        # The smallest of random keys are a draw without replacement; classes with fewer images have no key beyond
        # their last.
        keys = rng.random((self.ways, self._most))
        keys[np.arange(self._most) >= self._counts[classes][:, None]] = 2.0
        chosen = np.argsort(keys, axis=1)[:, : self.shots + self.queries]
        return self._order[self._first[classes][:, None] + chosen], rng.integers(0, 4, self.ways), places


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


def _turned(images: Tensor, turns: Tensor) -> Tensor:
    """Turns the images [T, ways, n, C, H, W] of each class by turns [T, ways] quarter turns."""
    out = images.clone()
    for quarter in (1, 2, 3):
        chosen = turns == quarter
        out[chosen] = torch.rot90(images[chosen], quarter, (-2, -1))
    return out
