"""Batches of tasks, the next one assembled while the current one is at work."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

from metahpo.tasks.task import Task, TaskSource
from metahpo.training.first_batch import drawn

T = TypeVar("T")
Numbers = TypeVar("Numbers", bound=Sequence[int])


def batches_of(
    source: TaskSource, batches: Iterable[Numbers], device: torch.device
) -> Generator[tuple[Numbers, Task], None, None]:
    """Yields the numbers of each batch and ``source.batch`` of them on ``device``; close it when leaving early.

    On CUDA a thread draws the next batch and copies it from pinned memory on a stream of its own while the caller
    computes. On the CPU nothing would be gained (drawing takes 0.4% of a step on images, 4% on the smallest nets, and
    the cores are busy), so there each batch is drawn when it is asked for. What a source raises is raised here, at the
    batch concerned.
    """
    if device.type != "cuda":
        for numbers in batches:
            yield numbers, drawn(source, numbers).to(device)
        return
    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # The source's own data may still be on their way.

    def draw(numbers: Numbers) -> tuple[Numbers, Task, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            parts = drawn(source, numbers)
            moved = Task(*((t if t.is_cuda else t.pin_memory()).to(device, non_blocking=True) for t in parts))
            ready = torch.cuda.Event()
            ready.record(stream)
            return numbers, moved, ready

    ahead = one_ahead(draw, batches)
    try:
        for numbers, tasks, ready in ahead:
            current = torch.cuda.current_stream(device)
            current.wait_event(ready)
            for tensor in tasks:
                tensor.record_stream(current)  # Else its memory could be drawn into again while still being read.
            yield numbers, tasks
    finally:
        ahead.close()


def one_ahead(make: Callable[[Numbers], T], items: Iterable[Numbers]) -> Generator[T, None, None]:
    """``make`` of each item in order; a thread makes the next while the caller works on the current one."""
    pool = ThreadPoolExecutor(1, "tasks")
    waiting: Future[T] | None = None
    try:
        for item in items:
            following = pool.submit(make, item)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # One for all: memory that was used on a stream is kept for that stream.
    return torch.cuda.Stream(device)
