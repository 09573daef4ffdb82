"""The task: what a learner adapts to (support) and is judged by (query)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class Task(NamedTuple):
    """One task, or a batch of them.

    One task has ``support_x`` of shape [N, ...], ``support_y`` [N] (for regression of the outputs' shape, as a rule
    [N, D]), and the same for the query set; a batch of tasks has one more leading dimension [T, N, ...].
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    def to(self, *args, **kwargs) -> Task:
        """The task with every tensor moved as by ``Tensor.to``."""
        return Task(*(t.to(*args, **kwargs) for t in self))

    def select(self, index: int) -> Task:
        """Task number ``index`` of a batch."""
        return Task(*(t[index] for t in self))


@runtime_checkable
class TaskSource(Protocol):
    """Numbered tasks: both methods are pure functions of the source's settings and the numbers given.

    On CUDA a thread calls ``batch`` while a training step runs: draw from generators of your own, never from torch's or
    NumPy's global ones, not even seeded.
    """

    def task(self, index: int) -> Task:
        """Task number ``index`` (>= 0)."""
        ...

    def batch(self, indices: Sequence[int]) -> Task:
        """The tasks of these numbers, stacked along a new first dimension."""
        ...
