"""Checks that the sources of tasks share."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from metahpo.checks import check_whole, plain, refuse
from metahpo.errors import DataArgumentError, did_you_mean


def task_numbers(owner: object, indices: Any) -> list[int]:
    """The numbers of a batch's tasks as plain ints.

    Raises:
        DataArgumentError: Unless they are whole numbers from 0 on, at least one.
    """
    if isinstance(indices, range) and indices and indices[0] >= 0 <= indices[-1]:
        return list(indices)
    if isinstance(plain(indices), (str, bytes)) or not isinstance(indices, Iterable):
        refuse(owner, "indices", indices, "a sequence of task numbers", DataArgumentError)
    numbers = [check_whole(owner, "index", i, at_least=0, error=DataArgumentError) for i in indices]
    if not numbers:
        refuse(owner, "indices", indices, "at least one task number", DataArgumentError)
    return numbers


def check_device(owner: object, device: Any) -> torch.device:
    """The torch device of that name."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        refuse(owner, "device", device, "a torch device such as 'cpu' or 'cuda:0'", DataArgumentError)


def refuse_unknown(function: Any, settings: Mapping[str, Any]) -> None:
    """Raises DataArgumentError for a keyword that ``function`` does not take, with the nearest one."""
    known = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    for name in settings:
        if name not in known:
            raise DataArgumentError(
                f"{function.__name__}: has no argument {name!r}; {did_you_mean(name, known)}"
            )
