"""Task sets of learn2learn as task sources."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metahpo.errors import DataError, one_line
from metahpo.tasks.task import Task

# Python's generator is one for the process: a source may be read by a thread while another is read here.
_seeding = threading.Lock()


class Learn2LearnTasks:
    """The tasks of a ``learn2learn.data.Taskset`` by number: task i is a pure function of (seed, i).

    taskset: one whose task is (inputs [N, ...], labels [N]) with labels 0..ways-1 (``RemapLabels``), equally many of
    each. shots: how many of each class, the first, are its support; the others are its query. Both are ordered by
    class. A task set of ``num_tasks`` tasks is gone through again and again: task i is task i mod ``num_tasks``.

    learn2learn draws its tasks from Python's global generator, which is seeded from (seed, i) while a task is made and
    then put back; the task set's own cache is left alone.

    Raises DataError for another object, for tasks of another form, for labels that are strings (a task's classes would
    differ from process to process), and where making a task twice does not give it twice: its transforms draw from
    another generator, such as torch's.
    """

    def __init__(self, taskset: Any, *, shots: int, seed: int = 0):
        if not all(callable(getattr(taskset, name, None)) for name in ("sample_task_description", "get_task")):
            raise DataError(f"expected a Taskset of learn2learn, found {type(taskset).__name__}")
        if any(isinstance(label, (str, bytes)) for label in getattr(taskset.dataset, "labels", ())):
            raise DataError("the task set's labels are strings, whose order in a set is random; give integers")
        if shots < 1:
            raise DataError(f"shots must be at least 1, found {shots}")
        self.taskset, self.shots, self.seed = taskset, shots, seed
        if not all(torch.equal(first, again) for first, again in zip(self.task(0), self.task(0))):
            raise DataError("the task set made two different tasks of one seed; let it draw from Python's random alone")

    def task(self, index: int) -> Task:
        x, y = self._sample(int(index))
        support, query = self._split(y)
        return Task(x[support], y[support], x[query], y[query])

    def batch(self, indices: Sequence[int]) -> Task:
        return Task(*(torch.stack(parts) for parts in zip(*map(self.task, indices))))

    def _sample(self, index: int) -> tuple[Tensor, Tensor]:
        if self.taskset.num_tasks > 0:
            index %= self.taskset.num_tasks
        with _seeding:
            before = random.getstate()
            random.seed(f"{self.seed} {index}")
            try:
                x, y = self.taskset.get_task(self.taskset.sample_task_description())
            except Exception as error:
                reason = f"{type(error).__name__}: {one_line(error)}"
                raise DataError(f"the task set gives no (inputs, labels) for task {index}: {reason}") from error
            finally:
                random.setstate(before)
        if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
            raise DataError(f"the task set gives {type(x).__name__} and {type(y).__name__}, expected two tensors")
        return x, y

    def _split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The places of support and query, by class."""
        counts = torch.bincount(y) if y.dtype == torch.int64 and y.dim() == 1 and bool(y.min() >= 0) else None
        if counts is None or bool((counts != counts[0]).any()):
            raise DataError(
                f"a task of the task set has labels {one_line(y.tolist(), 60)}; expected integers 0..ways-1, equally "
                "many of each: end its transforms by RemapLabels"
            )
        if counts[0] <= self.shots:
            raise DataError(f"a task has {int(counts[0])} of each class, too few for {self.shots} shots and a query")
        places = torch.argsort(y, stable=True).view(len(counts), -1)
        return places[:, : self.shots].flatten(), places[:, self.shots :].flatten()
