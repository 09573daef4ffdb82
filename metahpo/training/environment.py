"""What a run takes from, and leaves to, the process around it: random generators, the terminal, versions."""

from __future__ import annotations

import hashlib
import platform
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm

from metahpo import __version__, torchrun
from metahpo.functional.turns import TURN
from metahpo.inner.randomness import python_draws_kept


@contextmanager
def seeded(*numbers: int, device: torch.device | None = None) -> Iterator[None]:
    """Inside it the generators of torch (CPU's and ``device``'s), ``random`` and ``numpy.random`` are seeded from
    ``numbers``; outside they are as before. Threads that seed take turns, as the generators are one for all."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    seed = int.from_bytes(digest[:7], "big")
    devices = [device] if device is not None and device.type == "cuda" else []
    with TURN, torch.random.fork_rng(devices=devices), python_draws_kept():
        torch.random.default_generator.manual_seed(seed)
        random.seed(seed)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(seed % 2**32)
        for cuda in devices:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def intra_op_threads(count: int | None) -> Iterator[None]:
    """Inside it torch computes with ``count`` threads (None: as many as before); outside with as many as before."""
    before = torch.get_num_threads()
    # Not set to what it is already: torch would also set it for threads that have yet to begin.
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def progress(title: str, total: int, initial: int = 0) -> tqdm:
    """A progress bar on a terminal, of rank 0 alone; nothing elsewhere."""
    hidden = not sys.stderr.isatty() or torchrun.rank() > 0
    return tqdm(desc=title, total=total, initial=initial, leave=False, disable=hidden, dynamic_ncols=True)


def versions(device: torch.device) -> dict[str, str]:
    """What a run's numbers may depend on beside its config."""
    return {
        "metahpo": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": str(device),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "threads": str(torch.get_num_threads()),
    }
