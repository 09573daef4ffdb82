"""Image completion: regression from a pixel's place to its intensity, an image a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from metahpo.checks import KnownKeywords, check_type, check_whole
from metahpo.errors import DataArgumentError
from metahpo.tasks.arguments import task_numbers
from metahpo.tasks.digits import digit_images
from metahpo.tasks.pixels import net_images
from metahpo.tasks.task import Task

DIGITS = {"train": 1197, "val": 200, "test": 400}  # images of each split


class ImageCompletion(KnownKeywords):
    """Grey images [M, H, W] in 0..1 as regression tasks: from some pixels of an image to the others.

    The task of neural processes (Garnelo et al. 2018, section 4.2) and of CAVIA (Zintgraf et al. 2019, section 5.1.2):
    support_x [shots, 2] is the (row, column) of random pixels, each from -1 to 1; support_y [shots, 1] their
    intensity; the query set, as many other pixels as ``queries`` or all the others. float32.

    Tasks are numbered, pure functions of (seed, split, number). M tasks in turn are each of the images once, in an
    order of their own: tasks 0 to M - 1 of a test split are its images.
    """

    keyword_error = DataArgumentError

    def __init__(self, images: Tensor, split: str, *, shots: int = 10, queries: int | None = None, seed: int = 0):
        check_type(self, "images", images, Tensor, error=DataArgumentError)
        if images.dim() != 3 or not images.numel():
            raise DataArgumentError(f"image completion: found images {list(images.shape)}, expected [M, H, W]")
        images = net_images(images, "image completion: images")
        if not images.is_floating_point():
            images = images.float() / 255
        split = check_type(self, "split", split, str, error=DataArgumentError)
        shots = check_whole(self, "shots", shots, error=DataArgumentError)
        seed = check_whole(self, "seed", seed, at_least=0, error=DataArgumentError)
        if queries is not None:
            queries = check_whole(self, "queries", queries, at_least=1, error=DataArgumentError)
        height, width = images.shape[1:]
        pixels = height * width
        most = pixels - shots - (queries or 1)
        if shots < 1 or most < 0:
            asked = f"{shots} shots + {'at least 1' if queries is None else queries} queries"
            raise DataArgumentError(f"image completion: an image has {pixels} pixels; a task needs {asked}")
        self.split, self.shots, self.seed = split, shots, seed
        self.queries = pixels - shots if queries is None else queries
        self._values = images.float().reshape(len(images), pixels)
        sides = (torch.linspace(-1, 1, height), torch.linspace(-1, 1, width))
        self._places = torch.cartesian_prod(*sides).to(images.device)

    def task(self, index: int) -> Task:
        return self.batch([index]).select(0)

    def batch(self, indices: Sequence[int]) -> Task:
        count, pixels = self._values.shape
        numbers = np.asarray(task_numbers(self, indices))
        orders = {turn: self._rng(turn, 1).permutation(count) for turn in np.unique(numbers // count)}
        images = np.array([orders[number // count][number % count] for number in numbers])
        keys = np.stack([self._rng(number).random(pixels) for number in numbers])
        chosen = torch.as_tensor(np.argsort(keys, axis=1)[:, : self.shots + self.queries], device=self._values.device)
        y = self._values[torch.as_tensor(images, device=chosen.device)].gather(1, chosen)[..., None]
        x = self._places[chosen]
        return Task(x[:, : self.shots], y[:, : self.shots], x[:, self.shots :], y[:, self.shots :])

    def _rng(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, crc32(self.split.encode()), *map(int, numbers)])


def digits_by_split() -> Mapping[str, Tensor]:
    """scikit-learn's digits, images [M, 8, 8] in 0..1 of each split: 1,197 train, 200 val, 400 test, mixed once for
    all."""
    images, _ = digit_images()
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(images)))
    return dict(zip(DIGITS, images[order].split(list(DIGITS.values()))))
