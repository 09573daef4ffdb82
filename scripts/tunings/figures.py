"""What the proofs of the tunings share."""

from __future__ import annotations

import statistics
from typing import Any

import torch.nn.functional as F
from torch import nn

from metahpo.tuning.base import test
from metahpo.tuning.data import Labelled

Row = dict[str, Any]


def score(net: nn.Module, data: Labelled) -> Row:
    return test(net, F.cross_entropy, data.x, data.y)


def spread(values: list[float]) -> str:
    """Mean and deviation."""
    deviation = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"
