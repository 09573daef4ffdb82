"""scikit-learn's handwritten digits, which come with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def digit_images() -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits of the UCI repository: images [1797, 8, 8] in 0..1, and their labels [1797]."""
    from sklearn.datasets import load_digits  # Takes a second to import.

    bunch: Any = load_digits()
    return torch.from_numpy(bunch.images).float().div(16), torch.from_numpy(bunch.target).long()
