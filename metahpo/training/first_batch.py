"""What is said of tasks that do not fit the learner, where they are first met."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from metahpo.errors import DataArgumentError, MetaHPOError, NetArgumentError, one_line
from metahpo.tasks.task import Task, TaskSource


def drawn(source: TaskSource, numbers: Sequence[int]) -> Task:
    """The tasks of these numbers.

    Raises:
        DataArgumentError: If the source gives anything but a ``Task`` of tensors.
    """
    tasks = source.batch(numbers)
    if not isinstance(tasks, Task) or not all(isinstance(part, Tensor) for part in tasks):
        parts = [type(part).__name__ for part in tasks] if isinstance(tasks, tuple) else []
        found = f"{type(tasks).__name__}{f' of {chr(44).join(parts)}' if parts else ''}"
        raise DataArgumentError(f"{type(source).__name__}.batch: gave {found}, expected a Task of tensors")
    return tasks


def check_batch(source: object, tasks: Task, count: int) -> None:
    """Looks at the form of a batch of tasks.

    Raises:
        DataArgumentError: Unless it holds ``count`` tasks, each with as many inputs as targets.
    """
    whose = f"{type(source).__name__}.batch"
    for name, part in zip(Task._fields, tasks):
        if part.dim() < 2 or len(part) != count:
            raise DataArgumentError(
                f"{whose}: {name} is {list(part.shape)}, expected [{count}, N, ...] for {count} tasks"
            )
    for kind, x, y in (("support", tasks.support_x, tasks.support_y), ("query", tasks.query_x, tasks.query_y)):
        if x.shape[1] != y.shape[1] or not x.shape[1]:
            raise DataArgumentError(
                f"{whose}: {kind}_x is {list(x.shape)} and {kind}_y {list(y.shape)}, expected as many of both for a "
                "task, at least 1"
            )


@contextmanager
def explained(learner: object, tasks: Task) -> Iterator[None]:
    """Inside it an error of torch's names the learner and the shapes that it was given, in a line.

    Raises:
        NetArgumentError: In place of what torch or Python raises for values that do not fit.
    """
    try:
        yield
    except (MetaHPOError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shapes = ", ".join(f"{name} {list(part.shape)}" for name, part in zip(Task._fields, tasks))
        raise NetArgumentError(
            f"{type(learner).__name__}: fails on its first batch of tasks ({shapes}): {type(error).__name__}: "
            f"{one_line(error)}"
        ) from error
