"""Labelled data whole in memory, for tunings that look at all of it or at chosen examples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from metahpo.errors import DataError, one_line


class Labelled(NamedTuple):
    """Examples [N, ...] and their targets: labels int64 [N], or values [N, D]."""

    x: Tensor
    y: Tensor

    def to(self, device: torch.device | str) -> Labelled:
        return Labelled(self.x.to(device), self.y.to(device))

    def select(self, which: Tensor) -> Labelled:
        return Labelled(self.x[which], self.y[which])

    @property
    def classes(self) -> int:
        return int(self.y.max()) + 1


def labelled(data: Any, what: str = "dataset") -> Labelled:
    """The whole of a data set as tensors.

    data: a ``Labelled``, a pair of tensors, a ``Dataset`` of (x, y), or a ``DataLoader``, whose batches are joined.
    Raises DataError, which begins with ``what``, where examples are missing, of different shapes, or not numbers.
    """
    try:
        if isinstance(data, TensorDataset):
            x, y = data.tensors
        elif isinstance(data, DataLoader):
            parts = [(torch.as_tensor(x), torch.as_tensor(y)) for x, y in data]
            x, y = (torch.cat(each) for each in zip(*parts))
        elif isinstance(data, Dataset):
            pairs = [data[i] for i in range(len(data))]  # type: ignore[arg-type]
            x, y = (torch.stack([torch.as_tensor(value) for value in each]) for each in zip(*pairs))
        else:
            x, y = (torch.as_tensor(value) for value in data)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{what}: expected examples and targets as tensors of one shape: {one_line(error)}") from None
    if len(x) != len(y) or not len(x):
        raise DataError(f"{what}: found {len(x)} examples and {len(y)} targets, expected as many of both, at least 1")
    if not x.is_floating_point():
        raise DataError(f"{what}: the examples are {x.dtype}, expected floating point")
    if not y.is_floating_point():
        y = y.long()
        if y.dim() != 1 or int(y.min()) < 0:
            raise DataError(f"{what}: the labels are {list(y.shape)}, least {int(y.min())}; expected [N] from 0 on")
    return Labelled(x, y)


def minibatches(data: Labelled, size: int, generator: torch.Generator) -> Iterator[Labelled]:
    """Endless batches of ``size``, each pass over the data in a new order; generator: on the CPU."""
    size = min(size, len(data.x))
    while True:
        order = torch.randperm(len(data.x), generator=generator).to(data.x.device)
        for first in range(0, len(order) - size + 1, size):
            yield data.select(order[first : first + size])


def load_digits(sizes: tuple[int, int, int] = (900, 300, 597), seed: int = 0) -> dict[str, Labelled]:
    """scikit-learn's 1,797 handwritten digits (8 x 8, from UCI) as [N, 1, 8, 8] in 0...1, no download.

    Shuffled by ``seed`` into "train", "val" and "test" of the given sizes. Raises DataError if they are too many.
    """
    from sklearn.datasets import load_digits as load

    bunch: Any = load()
    images = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)
    return shuffled(Labelled(images, torch.from_numpy(bunch.target).long()), sizes, seed)


def shuffled(data: Labelled, sizes: tuple[int, int, int], seed: int) -> dict[str, Labelled]:
    """Disjoint random parts "train", "val" and "test" of the given sizes."""
    if sum(sizes) > len(data.x) or min(sizes) < 1:
        raise DataError(
            f"sizes of train, val and test: found {' + '.join(map(str, sizes))}, expected at least 1 each and at most "
            f"{len(data.x)} together"
        )
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(seed)).to(data.x.device)
    parts = order[: sum(sizes)].split(list(sizes))
    return {name: data.select(part) for name, part in zip(("train", "val", "test"), parts)}
