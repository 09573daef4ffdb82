"""Telling what is wrong with what was checked."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Sequence

from metahpo.errors import MetaHPOError, one_line


def raise_faults(subject: str, faults: Sequence[tuple[str, Exception]], methods: Collection[str]) -> None:
    """AssertionError with a line for each fault, a check's name and what it raised; none: nothing happens.

    methods: those of the subject's own, in whose lines the cause of another error is looked for.
    """
    if faults:
        lines = [f"{subject} does not conform:", *(f"- {name}: {_said(error, methods)}" for name, error in faults)]
        raise AssertionError("\n".join(lines)) from faults[0][1]


def _said(error: Exception, methods: Collection[str]) -> str:
    if isinstance(error, (AssertionError, MetaHPOError)) and str(error):
        return one_line(error, 1000)
    frames = traceback.extract_tb(error.__traceback__)
    # The subject's own line, rather than one of a library that it called.
    where = next((frame for frame in reversed(frames) if frame.name in methods), frames[-1])
    what = f"{type(error).__name__}: {one_line(error)}" if str(error) else type(error).__name__
    return f"{what} ({where.filename}, line {where.lineno}, in {where.name})"
