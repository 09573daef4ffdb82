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
import traceback
from collections.abc import Callable, Sequence

from metahpo.errors import SearchError, one_line
from metahpo.searchers.base import Searcher
from metahpo.testing.checks import CHECKS
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
    if faults:
        lines = [f"{searcher!r} does not conform:", *(f"- {name}: {_said(error)}" for name, error in faults)]
        raise AssertionError("\n".join(lines)) from faults[0][1]


def _said(error: Exception) -> str:
    if isinstance(error, (AssertionError, SearchError)) and str(error):
        return one_line(error, 1000)
    frames = traceback.extract_tb(error.__traceback__)
    # The searcher's own line, rather than one of a library that it called.
    where = next((frame for frame in reversed(frames) if frame.name == "suggest"), frames[-1])
    what = f"{type(error).__name__}: {one_line(error)}" if str(error) else type(error).__name__
    return f"{what} ({where.filename}, line {where.lineno}, in {where.name})"
