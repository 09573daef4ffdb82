"""N-way K-shot tasks from any labelled data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from metahpo.checks import KnownKeywords, check_choice, check_flag, check_keywords, check_type, check_whole
from metahpo.errors import DataArgumentError, DataError
from metahpo.tasks.arguments import check_device, task_numbers
from metahpo.tasks.datasets import labelled
from metahpo.tasks.labelled import LabelledImages
from metahpo.tasks.shots import Count, Imbalance, check_count, ends
from metahpo.tasks.task import Task


class Episodes(KnownKeywords):
    """Numbered few-shot tasks (Vinyals et al. 2016, section 4): task i is a pure function of (seed, split, i).

    Each task draws ``ways`` classes of the split and, of each, ``shots`` support and ``queries`` query images, all
    different. Images come as float32 [N, C, H, W], labels as int64 0..ways-1; sets are ordered by class.
    labels: "task" for those, or "class" for a class's place among the split's, 0..``classes``-1, the same in all tasks.
    rotate: each class of a task is turned by a random multiple of 90 degrees (the augmentation of Santoro et al. 2016;
    square images). imbalance: support images are unevenly many from class to class, ``shots`` on average.

    ways, shots: a number, or a range (low, high), from which they are drawn once for tasks 0 to group - 1, for group to
    2 group - 1, and so on. A batch is a stack of tasks of one shape, so it must lie within one such group: give the
    number of tasks of a training's batch. Other batches raise DataError.

    Images of uint8 are divided by 255, those of floats come as they are. They stay on ``device`` until a batch is
    drawn, which is assembled without a loop over images.
    """

    keyword_error = DataArgumentError

    def __init__(
        self,
        data: LabelledImages,
        split: str,
        *,
        ways: Count,
        shots: Count,
        queries: int,
        seed: int = 0,
        rotate: bool = False,
        labels: Literal["task", "class"] = "task",
        imbalance: Imbalance | None = None,
        group: int = 1,
        device: torch.device | str = "cpu",
    ):
        check_type(self, "data", data, LabelledImages, error=DataArgumentError)
        if not isinstance(split, str) or split not in data.splits:
            raise DataArgumentError(f"Episodes: the data has no split {split!r}; it has {', '.join(data.splits)}")
        ways, shots = check_count(self, "ways", ways), check_count(self, "shots", shots)
        queries = check_whole(self, "queries", queries, at_least=1, error=DataArgumentError)
        seed = check_whole(self, "seed", seed, at_least=0, error=DataArgumentError)
        group = check_whole(self, "group", group, at_least=1, error=DataArgumentError)
        rotate = check_flag(self, "rotate", rotate, error=DataArgumentError)
        check_choice(self, "labels", labels, ("task", "class"), error=DataArgumentError)
        if imbalance is not None:
            check_type(self, "imbalance", imbalance, Imbalance, error=DataArgumentError)
        classes = np.asarray(data.splits[split], dtype=np.int64)
        if len(classes) and classes.max() >= len(data.class_names):
            raise DataArgumentError(
                f"Episodes: split {split!r} has class {classes.max()}, expected one of the "
                f"{len(data.class_names)} class names"
            )
        if len(classes) < ends(ways)[1]:
            raise DataArgumentError(
                f"Episodes: ways: split {split!r} has {len(classes)} classes, fewer than the {ends(ways)[1]} ways of a "
                "task"
            )
        of_images = data.labels.cpu().numpy()
        order = np.argsort(of_images, kind="stable")
        counts = np.bincount(of_images, minlength=len(data.class_names))
        for mean in ends(shots) if imbalance else ():
            imbalance.check(mean)
        most = imbalance.max if imbalance else ends(shots)[1]
        need, short = most + queries, [c for c in classes if counts[c] < most + queries]
        if short:
            name, count = data.class_names[short[0]], counts[short[0]]
            more = f" (and {len(short) - 1} more such classes)" if len(short) > 1 else ""
            raise DataArgumentError(
                f"Episodes: {'shots' if most >= count else 'queries'}: class {name!r} of split {split!r} has {count} "
                f"images; a task needs {need} ({most} shots + {queries} queries){more}"
            )
        if rotate and data.images.shape[-1] != data.images.shape[-2]:
            found = tuple(data.images.shape[-2:])
            raise DataArgumentError(f"Episodes: rotate needs square images, found {found}")
        self.ways, self.shots, self.queries, self.imbalance, self.group = ways, shots, queries, imbalance, group
        self.seed, self.split, self.rotate = seed, split, rotate
        self.class_names, self.labels = data.class_names, labels
        self._images = data.images.to(check_device(self, device))
        self._classes, self._counts = classes, counts
        self._order, self._first = order, np.concatenate([[0], np.cumsum(counts)[:-1]])
        self._most = int(counts[classes].max())
        data.warn_if_alike()

    @classmethod
    def from_dataset(
        cls, dataset: Dataset, classes: Mapping[str, Sequence[int | str]], split: str, **settings
    ) -> Episodes:
        """Episodes over a map-style dataset of (image, label); classes: labels, or names of classes, by split.

        Images and names are read as by ``metahpo.tasks.datasets.labelled``; ``class_names`` are the dataset's own.
        """
        check_keywords(cls, settings, DataArgumentError)
        return cls(labelled(dataset, classes), split, **settings)

    def task(self, index: int) -> Task:
        return self.batch([index]).select(0)

    def batch(self, indices: Sequence[int]) -> Task:
        indices = task_numbers(self, indices)
        ways, shots = self._shape(indices)
        draws = [self._draw(index, ways, shots) for index in indices]
        device = self._images.device
        support, query, members, places, turns = (torch.as_tensor(np.stack(part)).to(device) for part in zip(*draws))
        asked = torch.arange(ways, device=device).repeat_interleave(self.queries).repeat(len(draws), 1)
        task = Task(self._pictures(support, members, turns), members, self._pictures(query, asked, turns), asked)
        if self.labels == "class":
            task = task._replace(support_y=places.gather(1, members), query_y=places.gather(1, asked))
        return task

    @property
    def classes(self) -> int:
        """How many classes the split has."""
        return len(self._classes)

    @property
    def content(self) -> dict[str, Tensor]:
        """What all tasks are made of: the images, and the numbers [M] of the split's, class by class."""
        rows = [self._order[self._first[c] : self._first[c] + self._counts[c]] for c in self._classes]
        return {"images": self._images, f"images of {self.split} by class": torch.as_tensor(np.concatenate(rows))}

    def _pictures(self, rows: Tensor, members: Tensor, turns: Tensor) -> Tensor:
        """The images of these numbers [T, N], of these classes of their task [T, N], turned as turns [T, ways] say."""
        images = self._images[rows]  # [T, N, C, H, W]
        if self.rotate:
            images = _turned(images, turns.gather(1, members))
        # Floats are what the net is to see.
        return images if images.is_floating_point() else images.to(torch.float32).div_(255)

    def _shape(self, indices: Sequence[int]) -> tuple[int, int]:
        """The ways and (mean) shots that all these tasks have."""
        if isinstance(self.ways, int) and isinstance(self.shots, int):
            return self.ways, self.shots
        groups = {index // self.group for index in indices}
        if len(groups) > 1:
            raise DataError(
                f"tasks {min(indices)} to {max(indices)} do not stack: ways and shots are drawn for each "
                f"{self.group} tasks in turn; a batch must lie within them"
            )
        rng = np.random.default_rng([self.seed, crc32(self.split.encode()), *groups, 1])
        ways, shots = (int(rng.integers(low, high + 1)) for low, high in map(ends, (self.ways, self.shots)))
        return ways, shots

    def _draw(self, index: int, ways: int, shots: int) -> _Draw:
        rng = np.random.default_rng([self.seed, crc32(self.split.encode()), index])
        places = rng.choice(len(self._classes), ways, replace=False)
        classes = self._classes[places]
        # The smallest of random keys are a draw without replacement; classes with fewer images have no key beyond
        # their last.
        keys = rng.random((ways, self._most))
        keys[np.arange(self._most) >= self._counts[classes][:, None]] = 2.0
        turns = rng.integers(0, 4, ways)
        sizes = self.imbalance.sizes(ways, shots, rng) if self.imbalance else np.full(ways, shots)
        chosen = np.argsort(keys, axis=1)[:, : sizes.max() + self.queries]
        rows, column = self._order[self._first[classes][:, None] + chosen], np.arange(chosen.shape[1])
        support, used = column < sizes[:, None], column < sizes[:, None] + self.queries
        return _Draw(rows[support], rows[used & ~support], np.repeat(np.arange(ways), sizes), places, turns)


class _Draw(NamedTuple):
    """What a task is made of.

    support [N], query [M]: numbers of images, ordered by class; members: the classes [N] of the support's, from 0;
    places: of its classes [ways] among the split's; turns: their quarter turns [ways].
    """

    support: np.ndarray
    query: np.ndarray
    members: np.ndarray
    places: np.ndarray
    turns: np.ndarray


def _turned(images: Tensor, turns: Tensor) -> Tensor:
    """Turns the images [T, N, C, H, W] by turns [T, N] quarter turns."""
    out = images.clone()
    for quarter in (1, 2, 3):
        chosen = turns == quarter
        out[chosen] = torch.rot90(images[chosen], quarter, (-2, -1))
    return out
