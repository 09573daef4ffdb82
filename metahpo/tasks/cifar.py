"""CIFAR-FS and FC100: two divisions of CIFAR-100's classes (Krizhevsky 2009) for few-shot learning."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metahpo.errors import DataError, one_line
from metahpo.tasks.arguments import check_archive
from metahpo.tasks.labelled import LabelledImages

FOLDER, SIDE = "cifar-100-python", 32
SOURCE = "get it by torchvision's CIFAR100(download=True) or from www.cs.toronto.edu/~kriz/cifar.html (python version)"

# The classes of Bertinetto et al. (github.com/bertinetto/r2d2); the other 64 train.
CIFAR_FS_VAL = """beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree motorcycle otter sea
    shark television tractor"""
CIFAR_FS_TEST = """baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose snail sweet_pepper
    table telephone wardrobe whale woman worm"""
# The superclasses of Oreshkin et al. (2018, supplementary material), 5 classes each; the other 12 train.
FC100_VAL = "large_carnivores large_omnivores_and_herbivores non-insect_invertebrates small_mammals"
FC100_TEST = "aquatic_mammals insects medium_mammals people"


def load_cifar_fs(root: str | os.PathLike[str], *, download: bool = False) -> LabelledImages:
    """CIFAR-FS (Bertinetto et al. 2019): 64 train, 16 val and 20 test classes of CIFAR-100.

    root: holds cifar-100-python, the archive's folder with the files train, test and meta, which are read together.
    images: uint8 [60000, 3, 32, 32], 600 a class; classes are named and numbered as in CIFAR-100. download=True fetches
    a missing folder by torchvision. Raises DataError, naming the file, if one is missing or damaged.
    """
    images, fine, _, names, _ = _read(check_archive("CIFAR-FS", root, download), download)
    return _divided(images, fine, names, list(range(len(names))), names, CIFAR_FS_VAL, CIFAR_FS_TEST)


def load_fc100(root: str | os.PathLike[str], *, download: bool = False) -> LabelledImages:
    """FC100 (Oreshkin et al. 2018): the classes of 12 train, 4 val and 4 test superclasses of CIFAR-100,
    60, 20 and 20 of them. Else as ``load_cifar_fs``."""
    images, fine, coarse, names, coarse_names = _read(check_archive("FC100", root, download), download)
    above = dict(zip(fine.tolist(), coarse.tolist()))
    groups = [above.get(c, 0) for c in range(len(names))]
    return _divided(images, fine, names, groups, coarse_names, FC100_VAL, FC100_TEST)


def _divided(
    images: np.ndarray,
    labels: np.ndarray,
    names: list[str],
    groups: list[int],
    group_names: list[str],
    val: str,
    test: str,
) -> LabelledImages:
    """The classes divided by the names of their groups."""
    splits: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for c, group in enumerate(groups):
        name = group_names[group]
        splits["val" if name in val.split() else "test" if name in test.split() else "train"].append(c)
    members = {split: tuple(classes) for split, classes in splits.items()}
    return LabelledImages(torch.from_numpy(images), torch.from_numpy(labels), tuple(names), members)


def _read(root: Path, download: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str], list[str]]:
    """Images [M, 3, 32, 32], labels and superclasses [M] of both parts, and the names of both."""
    folder = root / FOLDER
    if download and not folder.is_dir():
        _download(root)
    meta = _unpickled(folder / "meta", {"fine_label_names": list, "coarse_label_names": list})
    names, coarse_names = meta["fine_label_names"], meta["coarse_label_names"]
    unknown = [name for name in f"{CIFAR_FS_VAL} {CIFAR_FS_TEST}".split() if name not in names]
    if unknown := unknown + [name for name in f"{FC100_VAL} {FC100_TEST}".split() if name not in coarse_names]:
        raise DataError(f"{folder / 'meta'}: has no class {unknown[0]!r}, expected the names of CIFAR-100: {SOURCE}")
    keys = {"data": np.ndarray, "fine_labels": list, "coarse_labels": list}
    parts = [_part(folder / part, _unpickled(folder / part, keys), names, coarse_names) for part in ("train", "test")]
    images, fine, coarse = (np.concatenate(each) for each in zip(*parts))
    return images, fine, coarse, names, coarse_names


def _part(
    path: Path, found: dict[str, Any], names: list[str], coarse_names: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    data, count = found["data"], len(found["fine_labels"])
    fine, coarse = (np.array(found[f"{kind}_labels"], dtype=np.int64) for kind in ("fine", "coarse"))
    fit = data.dtype == np.uint8 and data.shape == (count, 3 * SIDE**2) and coarse.shape == fine.shape and count
    if not fit or min(fine.min(), coarse.min()) < 0 or fine.max() >= len(names) or coarse.max() >= len(coarse_names):
        raise DataError(
            f"{path}: found {data.dtype} {list(data.shape)} and {count} labels, expected uint8 [N, {3 * SIDE**2}] with "
            f"N labels from 0 to {len(names) - 1}: {SOURCE}"
        )
    return data.reshape(count, 3, SIDE, SIDE), fine, coarse


class _Restricted(pickle.Unpickler):
    """Makes arrays, numbers, strings and containers of them alone: a pickle could run anything."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            if name == "_reconstruct":
                return np.zeros(0).__reduce__()[0]  # Where it lives differs from version to version.
            if name in ("ndarray", "dtype"):
                return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickled(path: Path, keys: dict[str, type]) -> dict[str, Any]:
    """A file of the archive: a dict that has these keys, with values of these types."""
    try:
        with path.open("rb") as file:
            found = _Restricted(file, encoding="latin1").load()  # Written by Python 2.
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}), expected CIFAR-100: {SOURCE}") from None
    except Exception as error:  # What damaged pickles raise has no end.
        raise DataError(f"{path}: is damaged ({one_line(error)}), expected CIFAR-100: {SOURCE}") from error
    for key, kind in keys.items():
        if not isinstance(found, dict) or not isinstance(found.get(key), kind):
            raise DataError(f"{path}: has no {key!r}, expected CIFAR-100: {SOURCE}")
    return found


def _download(root: Path) -> None:
    try:
        from torchvision.datasets import CIFAR100
    except ImportError as error:
        raise DataError(
            "downloading CIFAR-100 needs torchvision, which is not installed: pip install 'metahpo[vision]'"
        ) from error
    try:
        CIFAR100(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{root}: CIFAR-100 could not be downloaded ({one_line(error)}); {SOURCE}") from error
