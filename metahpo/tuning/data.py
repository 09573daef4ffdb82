"""Labelled data whole in memory, for tunings that look at all of it or at chosen examples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from metahpo.errors import DataArgumentError, DataError, one_line
from metahpo.functional.lending import kept
from metahpo.tasks.digits import digit_images
from metahpo.training.environment import seeded

Part = TypeVar("Part")
# Keeps the numbers that reading draws apart from others.
_READING = 77
_LOOKS = 8


def read_once(data: Any, what: str, read: Callable[[Any, str], Part], seed: int) -> Part:
    """What ``read`` makes of a data set, which draws (random augmentation) by the seed alone; a warning tells if it
    does draw, as its examples are then those of this one reading.

    data: a ``Dataset`` or a ``DataLoader`` with one, or anything else.
    """
    with seeded(seed, _READING):
        found = read(data, what)
        source = data.dataset if isinstance(data, DataLoader) else data
        counted = isinstance(source, Dataset) and hasattr(source, "__len__")
        if counted and not isinstance(source, (TensorDataset, IterableDataset)):
            # A few, as a flip is not drawn each time.
            for i in range(min(_LOOKS, len(source))):  # type: ignore[arg-type]
                pair = [map(np.asarray, tree_leaves(source[i])) for _ in range(2)]
                if any(not np.array_equal(a, b) for a, b in zip(*pair)):
                    warnings.warn(
                        f"{what}: example {i} is another when it is read again (random augmentation); every example "
                        "was read once, and is used as it then was",
                        stacklevel=3,
                    )
                    break
    return found


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


class Examples:
    """Examples of any kind: a dict, tuple or list of tensors [N, ...]."""

    def __init__(self, tree: Any, what: str = "dataset"):
        if isinstance(tree, (Dataset, DataLoader)):
            parts = [kept(part) for part in (tree if isinstance(tree, DataLoader) else DataLoader(tree, len(tree)))]
            tree = tree_map(lambda *each: torch.cat(each), *parts)
        sizes = {len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else 0 for leaf in tree_leaves(tree)}
        if len(sizes) != 1 or 0 in sizes:
            raise DataArgumentError(
                f"{what}: expected a Dataset, a DataLoader, or a dict or tuple of tensors [N, ...] of one N, at least 1"
            )
        self.tree, self.size = tree, sizes.pop()

    def __len__(self) -> int:
        return self.size

    def to(self, device: torch.device | str) -> Examples:
        return Examples(tree_map(lambda t: t.to(device), self.tree))

    def select(self, which: Tensor) -> Examples:
        return Examples(tree_map(lambda t: t[which], self.tree))


def labelled(data: Any, what: str = "dataset", *, whole: bool = False) -> Labelled:
    """The whole of a data set as tensors.

    data: a ``Labelled``, a pair of tensors, a ``Dataset`` of (x, y), or a ``DataLoader``, whose batches are joined.
    whole: whether examples of whole numbers (token ids) are taken, as they are.
    Raises DataArgumentError, which begins with ``what``, where examples are missing, of different shapes, or not
    numbers.
    """
    try:
        if isinstance(data, TensorDataset):
            x, y = data.tensors
        elif isinstance(data, DataLoader):
            # As copies, as a loader may fill the same memory again.
            parts = [(torch.as_tensor(x).clone(), torch.as_tensor(y).clone()) for x, y in data]
            x, y = (torch.cat(each) for each in zip(*parts))
        elif isinstance(data, Dataset):
            pairs = [data[i] for i in range(len(data))]  # type: ignore[arg-type]
            x, y = (torch.stack([torch.as_tensor(value) for value in each]) for each in zip(*pairs))
        else:
            x, y = (torch.as_tensor(value) for value in data)
    except (ValueError, TypeError, RuntimeError) as error:
        line = one_line(error)
        raise DataArgumentError(
            f"{what}: expected pairs of examples and targets as tensors of one shape: {line}"
        ) from None
    if not x.dim() or not y.dim():
        raise DataArgumentError(
            f"{what}: found single values, expected examples [N, ...] and targets [N, ...]"
        )
    if len(x) != len(y) or not len(x):
        raise DataArgumentError(
            f"{what}: found {len(x)} examples and {len(y)} targets, expected as many of both, at least 1"
        )
    if not x.is_floating_point() and not (whole and not x.is_complex()):
        raise DataArgumentError(f"{what}: the examples are {x.dtype}, expected floating point")
    if y.is_floating_point() and y.dim() < 2:
        raise DataArgumentError(
            f"{what}: the targets are {y.dtype} {list(y.shape)}; expected values [N, D], or whole labels [N]"
        )
    if not y.is_floating_point():
        y = y.long()
        if y.dim() != 1 or int(y.min()) < 0:
            raise DataArgumentError(
                f"{what}: the labels are {list(y.shape)}, least {int(y.min())}; expected [N] from 0 on"
            )
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
    images, labels = digit_images()
    data = Labelled(images.unsqueeze(1), labels)
    return dict(zip(("train", "val", "test"), shuffled(data, sizes, seed)))


def shuffled(data: Labelled, sizes: Sequence[int], seed: int) -> list[Labelled]:
    """Disjoint random parts of the given sizes. Raises DataError if they are more than there is."""
    if sum(sizes) > len(data.x) or min(sizes) < 1:
        found = " + ".join(map(str, sizes))
        raise DataError(
            f"sizes of the data: found {found}, expected at least 1 each and at most {len(data.x)} together"
        )
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(seed)).to(data.x.device)
    return [data.select(part) for part in order[: sum(sizes)].split(list(sizes))]


class Loader:
    """Batches of ``size`` in a new order at each pass, drawn from torch's own generator; the rest of a pass is left
    out. Faster than a ``DataLoader``, which collates one example after the other."""

    def __init__(self, data: Labelled, size: int):
        self.data, self.size = data, min(size, len(data.x))

    def __iter__(self) -> Iterator[Labelled]:
        order = torch.randperm(len(self.data.x)).to(self.data.x.device)
        for first in range(0, len(order) - self.size + 1, self.size):
            yield self.data.select(order[first : first + self.size])


def with_wrong_labels(data: Labelled, share: float, seed: int) -> Labelled:
    """The data with ``share`` of its labels, drawn by ``seed``, each replaced by another class."""
    generator = torch.Generator().manual_seed(seed)
    count = round(share * len(data.y))
    which = torch.randperm(len(data.y), generator=generator)[:count].to(data.y.device)
    shift = torch.randint(1, data.classes, (count,), generator=generator).to(data.y.device)
    y = data.y.clone()
    y[which] = (y[which] + shift) % data.classes
    return Labelled(data.x, y)


_TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}


def load_torchvision(
    name: str, root: str | Path, sizes: tuple[int, int, int], seed: int = 0, download: bool = False
) -> dict[str, Labelled]:
    """ "mnist", "fashion_mnist" or "cifar10" as [N, C, H, W] in 0...1: "train" and "val" drawn by ``seed`` from the
    official training set, "test" from the official test set.

    Raises DataError if torchvision or the files are missing, or a part is larger than its set.
    """
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError(f"data {name} needs torchvision, which cannot be imported: {one_line(error)}") from None
    parts = []
    for train in (True, False):
        try:
            found = getattr(datasets, _TORCHVISION[name])(str(root), train=train, download=download)
        except (RuntimeError, OSError) as error:
            raise DataError(f"data {name} in {root}: {one_line(error)}; or set data.download=true") from None
        images = torch.as_tensor(found.data).float().div(255)
        # CIFAR's channels come last, MNIST's single one is left out.
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
        parts.append(Labelled(images, torch.as_tensor(found.targets).long()))
    train, val, test = sizes
    if test > len(parts[1].x):
        raise DataError(f"data.test: found {test}, expected at most the {len(parts[1].x)} of {name}'s test set")
    first = shuffled(parts[0], (train, val), seed)
    return {**dict(zip(("train", "val"), first)), "test": shuffled(parts[1], (test,), seed)[0]}
