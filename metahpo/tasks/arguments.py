"""Checks that the sources of tasks share."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from metahpo.checks import check_flag, check_type, check_whole, plain, refuse
from metahpo.errors import DataArgumentError


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


def check_archive(owner: object, root: Any, download: Any) -> Path:
    """The folder of a data set's archive; raises DataArgumentError unless it is a path and ``download`` a flag."""
    check_type(owner, "root", root, (str, os.PathLike), "a path", error=DataArgumentError)
    check_flag(owner, "download", download, error=DataArgumentError)
    return Path(root)


def check_device(owner: object, device: Any) -> torch.device:
    """The torch device of that name."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        refuse(owner, "device", device, "a torch device such as 'cpu' or 'cuda:0'", DataArgumentError)
