"""Time and peak memory of a piece of work."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measured(work: Callable[[], Result], device: torch.device) -> tuple[Result, float, int | None]:
    """(result, seconds, peak bytes above those in use before) of ``work()``.

    CUDA: torch's allocator. CPU: the process's resident set, whose peak Linux resets on request, after the C library
    has given its free pages back; exact to about a megabyte, and None on other systems. Run the work once before, so
    that what is loaded or compiled at first use is not counted.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before: int | None = torch.cuda.memory_allocated(device)
    else:
        before = _reset_peak()
    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    if before is None:
        return result, seconds, None
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")
    return result, seconds, max(peak - before, 0)


def _reset_peak() -> int | None:
    """Sets the peak of the resident set to what is resident now, and returns that; None where that is not possible."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")
    except (OSError, AttributeError):
        return None
    return _resident("VmRSS")


def _resident(key: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
