"""The same image in two splits of a data set, and classes without variety."""

from __future__ import annotations

import os
import warnings
from collections.abc import Hashable, Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
from torch import Tensor

from metahpo.errors import DataError


def digest(data: bytes | np.ndarray) -> bytes:
    """A few bytes that tell images apart."""
    return blake2b(data, digest_size=16).digest()


def refuse_same_file(files: Iterable[tuple[Path, str]]) -> None:
    """Raises DataError if a file comes twice, by whatever path or link.

    files: each with the place that names it, for the message.
    """
    places: dict[Hashable, str] = {}
    for file, place in files:
        first = places.setdefault(_identity(file), place)
        if first != place:
            raise DataError(
                f"{place} is in {first} already: expected each file once, by whatever path or link"
            )


def _identity(file: Path) -> Hashable:
    """What is the same for all paths and links to one file, on file systems without cases too."""
    found = os.stat(file)
    # Some network drives have no numbers.
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.normcase(os.path.realpath(file))


def warn_of_copies(digests: Sequence[bytes], splits: Sequence[str], names: Sequence[str]) -> None:
    """Warns, in a line, of images of one split that are in another one too.

    Args:
        digests: Of each image.
        splits: The split of each image.
        names: Of each image, for the message.
    """
    first: dict[bytes, int] = {}
    copies = [(first.setdefault(d, i), i) for i, d in enumerate(digests)]
    leaks = [(a, b) for a, b in copies if splits[a] != splits[b]]
    # Where all images are alike, that is what is said of them.
    if leaks and len(first) > 1:
        a, b = leaks[0]
        warnings.warn(
            f"{len(leaks)} images are copies of images in another split, so a test sees what was trained on; the "
            f"first is {names[b]} of {splits[b]}, a copy of {names[a]} of {splits[a]}",
            stacklevel=4,
        )


def alike(images: Tensor, labels: np.ndarray, names: Sequence[str]) -> str | None:
    """What is suspicious of classes whose images are all the same, in a line; None where there is no such class.

    Args:
        images: Of the whole data set, [M, C, H, W].
        labels: Of the images, [M].
        names: Of the classes.
    """
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=len(names))
    first = np.cumsum(counts) - counts
    several = np.flatnonzero(counts > 1)
    if not len(several):
        return None
    # Two images tell nearly every class to be none of those.
    heads = images[order[first[several]]]
    twins = (heads == images[order[first[several] + 1]]).flatten(1).all(1).cpu().numpy()
    found = []
    for c, head in zip(several[twins], heads[twins]):
        rows = order[first[c] : first[c] + counts[c]]
        if bool((images[rows] == head).all()):
            found.append(c)
    if not found:
        return None
    if len(found) == len(several) == np.count_nonzero(counts) and bool((heads == heads[0]).all()):
        return f"all {len(images)} images are alike"
    more = f", and so in {len(found) - 1} more classes" if len(found) > 1 else ""
    return f"all {counts[found[0]]} images of class {names[found[0]]!r} are alike{more}"
