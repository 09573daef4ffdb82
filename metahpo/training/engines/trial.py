"""A trial call of an engine, given up when it has lasted too long or takes too much memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Compiling kernels and filling caches, as a first call does, is a small part of so many seconds.
_LONG = 10.0


class GivenUp(Exception):
    """The trial was stopped; its text says why."""


def seconds_of(call: Callable[[], Any], most: float, wait: Callable[[], None] | None = None) -> float:
    """The seconds of a call: the shorter of two or, on the CPU, of one that lasts ten seconds.

    Args:
        call: What is timed.
        most: Seconds after which it is given up.
        wait: For a GPU: waits until it has done what it was asked.

    Raises:
        GivenUp: When the first call has lasted ``most`` seconds, or the process has grown by half of the memory that
            was available; looked at between the operations of this thread.
    """
    first = _timed(call, _Watch(most), wait)
    return first if first > _LONG and wait is None else min(first, _timed(call, None, wait))


def _timed(call: Callable[[], Any], watch: _Watch | None, wait: Callable[[], None] | None) -> float:
    start = time.perf_counter()
    if watch is None:
        call()
    else:
        with watch:
            call()
    if wait is not None:
        wait()
    return time.perf_counter() - start


class _Watch(TorchDispatchMode):
    def __init__(self, most: float):
        super().__init__()
        self._most, self._end, self._look = most, time.perf_counter() + most, 0.0
        self._limit = resident_bytes() + 0.5 * available_bytes()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        now = time.perf_counter()
        if now > self._end:
            raise GivenUp(f"more than {self._most:.3g} s")
        if now > self._look:
            self._look = now + 0.05
            if resident_bytes() > self._limit:
                raise GivenUp("too much memory")
        return func(*args, **(kwargs or {}))


def resident_bytes() -> float:
    """This process's memory; 0 where the system does not tell."""
    try:
        return float(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0.0


def available_bytes() -> float:
    """The memory that this process may still take; infinite where the system does not tell."""
    free = [float("inf")]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(float(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    try:  # A container's own limit; "max" for none.
        group = Path("/sys/fs/cgroup")
        free.append(float((group / "memory.max").read_text()) - float((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(free)
