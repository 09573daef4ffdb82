"""What data are, in a few numbers: kept with a run, they show that the data have changed since."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metahpo.tasks.episodes import Episodes
from metahpo.tasks.task import TaskSource

# Bytes that are summed at a time.
ROW = 2048


def content_of(sources: Mapping[str, TaskSource]) -> dict[str, Tensor]:
    """What the sources of some splits are made of, by name: of ``Episodes`` their images, of others the first task."""
    content: dict[str, Tensor] = {}
    for split, source in sources.items():
        if isinstance(source, Episodes):
            content |= source.content
        else:
            task = source.task(0)
            content |= {f"{name} of task 0 of {split}": tensor for name, tensor in zip(task._fields, task)}
    return content


def identity(content: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """For each tensor its type, its shape, and two weighted sums, which change if entries do or change places.

    Those of whole numbers are of their bits and exact. Those of floats [N, ...], which another machine may have
    computed with other rounding, are by row and by column; size is the sum of all absolute values, by which a
    difference is judged.
    """
    return {name: _identity(tensor.detach()) for name, tensor in content.items()}


def _identity(tensor: Tensor) -> dict[str, Any]:
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    found = _of_floats(values) if values.is_floating_point() else _of_bits(values)
    return {"type": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), **found}


def _of_floats(values: Tensor) -> dict[str, Any]:
    if not values.numel():
        return {"sums": [], "size": 0.0}
    rows = values.reshape(len(values) if values.dim() else 1, -1)
    rows = rows.float() if rows.element_size() < 4 else rows
    sums = [(each.double() * _fractions(each)).sum().item() for each in (rows.sum(1), rows.sum(0))]
    return {"sums": sums, "size": rows.norm(1, dim=1).double().sum().item()}


def _fractions(like: Tensor) -> Tensor:
    """Numbers from 0.5 to 1.5, all different and without a pattern: multiples of the golden ratio, less their whole
    part."""
    return (torch.arange(len(like), dtype=torch.float64, device=like.device) * 0.6180339887498949) % 1 + 0.5


def _of_bits(values: Tensor) -> dict[str, Any]:
    data = values.reshape(-1).view(torch.uint8)
    whole = len(data) // ROW * ROW
    # A copy begins where words of 8 bytes may.
    words = (data.clone() if data.storage_offset() % 8 else data)[:whole].view(torch.int64).view(-1, ROW // 8)
    parts = [words.sum(1), words.sum(0), data[whole:].long()]
    # Sums wrap around; by an odd weight no change is lost.
    return {"sums": [(part * (2 * torch.arange(len(part), device=part.device) + 1)).sum().item() for part in parts]}
