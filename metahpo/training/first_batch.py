"""What is said of tasks that do not fit the learner, where they are first met."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from metahpo.errors import DataArgumentError, MetaHPOError, NetArgumentError, one_line, out_of_memory, shown
from metahpo.learners.base import MetaLearner
from metahpo.learners.phase import Phase
from metahpo.tasks.task import Task, TaskSource


def drawn(source: TaskSource, numbers: Sequence[int]) -> Task:
    """The tasks of these numbers.

    Raises:
        DataArgumentError: If the source gives anything but a ``Task`` of tensors, or of fewer tasks than it was asked
            for.
    """
    tasks = source.batch(numbers)
    if not isinstance(tasks, Task) or not all(isinstance(part, Tensor) for part in tasks):
        parts = [type(part).__name__ for part in tasks] if isinstance(tasks, tuple) else []
        found = f"{type(tasks).__name__}{f' of {chr(44).join(parts)}' if parts else ''}"
        raise DataArgumentError(f"{type(source).__name__}.batch: gave {found}, expected a Task of tensors")
    for name, part in zip(Task._fields, tasks):
        if part.dim() and len(part) != len(numbers):
            raise DataArgumentError(
                f"{type(source).__name__}.batch: {name} is {list(part.shape)}, expected [{len(numbers)}, N, ...] for "
                f"the tasks numbered {shown(list(numbers))}"
            )
    return tasks


def check_reaches(name: str, source: TaskSource, count: int) -> None:
    """Asks a source for the last of ``count`` tasks, before the work on the first.

    Raises:
        DataArgumentError: If the source ends before it; name: of the argument.
    """
    try:
        source.task(count - 1)
    except LookupError as error:
        raise DataArgumentError(
            f"{name}: {type(source).__name__} has no task number {count - 1} ({type(error).__name__}: "
            f"{one_line(error, 120)}), but {count} tasks are asked for, numbered from 0"
        ) from error
    except Exception:
        return  # It is met again, and said, where the task is due.


def check_repeats(source: TaskSource, tasks: Task, numbers: Sequence[int]) -> None:
    """Asks for a batch again, and for its first task by itself.

    Raises:
        DataArgumentError: If they differ: the source draws from a generator that goes on, or counts.
    """
    one = source.task(numbers[0])
    same_form = [part.shape for part in one] == [part.shape for part in tasks.select(0)]
    which = f"task number {numbers[0]}" if len(numbers) == 1 else f"tasks {shown(list(numbers))}"
    for how, first, again in (("batch", tasks, drawn(source, numbers)), ("task", tasks.select(0), one)):
        for name, part, other in zip(Task._fields, first, again):
            if (how == "batch" or same_form) and not _alike(part.cpu(), other.cpu()):
                raise DataArgumentError(
                    f"{type(source).__name__}.{how}: {name} of {which} is another when it is asked for "
                    "again, but a task should depend on the source's settings and its number alone: draw it from a "
                    "generator seeded from these"
                )


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a, b.to(a.dtype), rtol=1e-3, atol=1e-6, equal_nan=True)


def check_batch(source: TaskSource, tasks: Task, numbers: Sequence[int]) -> None:
    """Looks at the form of a batch of tasks, and whether a source gives the first of them again.

    Raises:
        DataArgumentError: Unless it holds a task of each number, each with as many inputs as targets.
    """
    count = len(numbers)
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
    check_repeats(source, tasks, numbers)


def check_outputs(learner: MetaLearner, tasks: Task, phase: Phase) -> None:
    """As ``check_pairs``, of what a learner gives for the first task of a batch.

    Raises:
        DataArgumentError: If its loss pairs each output with every target.
    """
    targets = tasks.query_y[0]
    # Only a regression on scalars can be paired so; nothing is run for others.
    if not targets.is_floating_point() or targets.numel() != len(targets):
        return
    outputs: object = None
    with suppress(Exception):  # Whatever fails here is said where the task is run.
        outputs = learner.outputs(tasks.select(0), phase).get("after")
    check_pairs(learner, learner.loss, outputs, targets)


@torch.no_grad()
def check_pairs(owner: object, loss: Callable[..., Tensor], outputs: object, targets: Tensor) -> None:
    """Refuses a loss that pairs each of N outputs with each of N targets, as [N, 1] and [N] are broadcast.

    A net then learns their mean at best. Such a loss is the same when the targets change places.

    Args:
        owner: Whose loss it is, for the message: an object or its name.
        loss: (outputs, targets) -> scalar.
        outputs: What a net gave for N inputs; anything but a tensor of N numbers passes.
        targets: [N, ...].

    Raises:
        DataArgumentError: With both shapes.
    """
    if not isinstance(outputs, Tensor) or outputs.shape == targets.shape or not targets.is_floating_point():
        return
    if outputs.numel() != targets.numel() or len(targets) < 2 or targets.numel() != len(targets):
        return
    # Values that any loss takes, probabilities too, and that are all different.
    spread = torch.linspace(0.1, 0.9, len(targets), dtype=torch.float64, device=targets.device)
    values, labels = spread.to(outputs.dtype).view(outputs.shape), spread.to(targets.dtype).view(targets.shape)
    try:
        paired, moved = loss(values, labels), loss(values, labels.flip(0))
    except Exception:
        return
    if torch.allclose(paired, moved, rtol=1e-3, atol=0.0):
        whose = owner if isinstance(owner, str) else type(owner).__name__
        raise DataArgumentError(
            f"{whose}: outputs are {list(outputs.shape)} and targets {list(targets.shape)}, which the loss pairs each "
            f"with each; expected targets of the outputs' shape {list(outputs.shape)}"
        )


@contextmanager
def explained(learner: object, tasks: Task) -> Iterator[None]:
    """Inside it an error of torch's names the learner and the shapes that it was given, in a line.

    Raises:
        NetArgumentError: In place of what torch or Python raises for values that do not fit.
    """
    try:
        yield
    except MetaHPOError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if out_of_memory(error):
            raise
        shapes = ", ".join(f"{name} {list(part.shape)}" for name, part in zip(Task._fields, tasks))
        raise NetArgumentError(
            f"{type(learner).__name__}: fails on its first batch of tasks ({shapes}): {type(error).__name__}: "
            f"{one_line(error)}"
        ) from error
