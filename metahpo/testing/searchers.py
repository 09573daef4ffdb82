"""A conformance suite for searchers, also for a user's own.

In a test, a check at a time::

    import pytest
    from metahpo.testing import CHECKS, check_searcher

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_searcher(check):
        check_searcher(MySearcher(), checks=[check])
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from metahpo.errors import SearchError
from metahpo.searchers.base import Searcher
from metahpo.testing.checks import CHECKS
from metahpo.testing.report import raise_faults
from metahpo.testing.subject import Subject


def check_searcher(
    searcher: Searcher,
    *,
    trials: int = 24,
    deterministic: bool = False,
    max_budget: float | None = None,
    checks: Sequence[Callable[[Subject], None]] | None = None,
) -> None:
    """Raises AssertionError, which tells all that is wrong, unless the searcher keeps to what a study counts on.

    trials: how long each search is; more than those that the searcher draws at random to begin with. deterministic: it
    takes no part in the seed, as a grid. max_budget: the most that a multi-fidelity searcher may train a trial
    (default: its own ``max_budget``, if it has one). checks: some of ``CHECKS``. Spaces that the searcher's ``check``
    refuses are left out.
    """
    if not isinstance(searcher, Searcher):
        raise SearchError(f"check_searcher: expected a searcher, such as Random(), found {searcher!r}")
    if max_budget is None:
        max_budget = getattr(searcher, "max_budget", None)
    subject, faults = Subject(copy.deepcopy(searcher), trials, deterministic, max_budget), []
    for check in CHECKS if checks is None else checks:
        try:
            check(subject)
        except Exception as error:
            faults.append((check.__name__, error))
    raise_faults(repr(searcher), faults, ("suggest",))
