"""A conformance suite for meta-learners, also for a user's own.

In a test, a check at a time::

    import pytest
    from metahpo.testing import LEARNER_CHECKS, check_learner

    @pytest.mark.parametrize("check", LEARNER_CHECKS, ids=lambda check: check.__name__)
    def test_my_learner(check):
        check_learner(MyLearner, checks=[check])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from metahpo.learners.base import MetaLearner
from metahpo.tasks.task import TaskSource
from metahpo.testing.learner_checks import LEARNER_CHECKS
from metahpo.testing.learner_subject import LearnerSubject
from metahpo.testing.report import raise_faults


def check_learner(
    make: Callable[..., MetaLearner],
    *,
    net: Callable[[], nn.Module] | None = None,
    tasks: TaskSource | None = None,
    engines: Sequence[str] = ("loop", "threads", "vmap", "trace"),
    exact: bool = True,
    checks: Sequence[Callable[[LearnerSubject], None]] | None = None,
    **options: Any,
) -> None:
    """Raises AssertionError, which tells all that is wrong, unless the learner keeps to what engines and trainer count
    on.

    make: the learner's class, called as ``make(net, **options)``. net, tasks: a function that gives a net, and float64
    tasks that fit it; by default small convolutional nets and 3-way tasks of images [1, 8, 8]. engines: those that the
    learner claims to run under. exact: whether its outer gradient is that of its loss, which first-order ones' is not.
    checks: some of ``LEARNER_CHECKS``.
    """
    subject, faults = LearnerSubject(make, options, net, tasks, tuple(engines), exact), []
    for check in LEARNER_CHECKS if checks is None else checks:
        try:
            check(subject)
        except Exception as error:
            faults.append((check.__name__, error))
    raise_faults(getattr(make, "__name__", repr(make)), faults, ("adapt", "predict", "meta_loss"))
