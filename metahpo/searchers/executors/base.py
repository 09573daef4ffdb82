"""The interface of an executor, and what each of its workers does with a trial."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from metahpo.errors import CheckpointError, MetaHPOError, SearchError, StudyFileError, one_line
from metahpo.runs.files import write_atomically
from metahpo.searchers.lock import FileLock
from metahpo.searchers.outcome import Outcome
from metahpo.searchers.records import plain
from metahpo.searchers.trial import Job, Trial, number

Objective = Callable[[Trial], Any]

# The next coordinator may be there before a worker of the last one has noticed that it is gone.
ORPHAN_SECONDS = 60.0
MOST_TEXT = 20_000


@dataclass(frozen=True)
class Result:
    """How a trial ended: with scores, or with an error."""

    scores: tuple[float, ...] | None = None
    error: str | None = None
    gradients: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    reports: Mapping[int, float] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def of(cls, given: Any) -> Result:
        """From what an objective gave; what is no score, or is not finite, is an error."""
        outcome = given if isinstance(given, Outcome) else Outcome(given)
        scores = outcome.score if isinstance(outcome.score, (tuple, list)) else (outcome.score,)
        try:
            numbers = tuple(map(number, scores))
        except (TypeError, ValueError, OverflowError, RuntimeError):
            return cls(error=f"the objective gave {given!r:.200}, expected a number, a tuple of them, or an Outcome")
        if not numbers or not all(map(math.isfinite, numbers)):
            return cls(error=f"the score is {', '.join(map(str, numbers)) or 'empty'}")
        gradients = {name: float(value) for name, value in outcome.gradients.items() if math.isfinite(value)}
        try:
            notes = plain(outcome.notes)
        except (TypeError, ValueError, RecursionError) as error:
            return cls(error=f"the notes cannot be kept: {one_line(error)}")
        return cls(numbers, gradients=gradients, notes=notes)


@dataclass(frozen=True)
class Reported:
    number: int
    step: int
    score: float


@dataclass(frozen=True)
class Finished:
    number: int
    result: Result


@dataclass(frozen=True)
class Died:
    """The worker of a trial ended before the trial did. why: how, in a few words."""

    number: int
    why: str


Event = Reported | Finished | Died


class Executor:
    """Runs trials, at most ``workers`` at a time. Subclasses write all four methods."""

    workers: int = 1

    def start(self, objective: Objective, folder: Path | None) -> None:
        """Called once before the first ``submit``. folder: where logs may go."""
        raise NotImplementedError

    def submit(self, job: Job) -> None:
        raise NotImplementedError

    def wait(self, emit: Callable[[Event], None], seconds: float) -> None:
        """Hands on what has happened; waits for it up to about ``seconds``."""
        raise NotImplementedError

    def stop(self, grace: float) -> None:
        """Ends the workers: those at work are asked to, and killed ``grace`` seconds later."""
        raise NotImplementedError


def run_job(objective: Objective, job: Job, report: Callable[[int, float], None]) -> Result:
    """Runs a trial to its end, unless it has ended before: then its result is still there.

    What the objective raises is the trial's error; KeyboardInterrupt, by which it is stopped, is let through.
    """
    with ExitStack() as stack:
        if job.result:
            lock = FileLock(job.result.with_suffix(".lock"), f"trial {job.number}", ORPHAN_SECONDS)
            stack.enter_context(lock)
            if (found := read_result(job.result)) is not None:
                return found
        trial, started = Trial(job, report), time.perf_counter()
        try:
            result = Result.of(objective(trial))
        except (Exception, SystemExit) as raised:
            _refuse_fault(raised, job)
            result = Result(error=_told(raised))
        result = replace(result, reports=trial.reports, seconds=time.perf_counter() - started)
        if job.result:
            try:
                write_result(job.result, result)
            except OSError as error:
                raise _fault(error, job, job.result) from error
        return result


# Errors that say nothing about a trial's settings.
MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
MACHINE |= {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.EFBIG}


def _refuse_fault(raised: BaseException, job: Job) -> None:
    """Raises SearchError where the machine failed rather than the trial: a full disk, a damaged file, ...

    The trial stays at work: when the search is gone on with, it is tried again.
    """
    of_machine = isinstance(raised, OSError) and raised.errno in MACHINE
    if of_machine or isinstance(raised, (CheckpointError, StudyFileError)):
        raise _fault(raised, job, job.folder) from raised


def _fault(error: BaseException, job: Job, path: Path | None) -> SearchError:
    said = one_line(error)
    if isinstance(error, OSError):
        where = error.filename or path
        said = f"{where}: {error.strerror or said}" if where else error.strerror or said
    return SearchError(f"stopped at trial {job.number}, which is tried again when the search is gone on with: {said}")


def write_result(path: Path, result: Result) -> None:
    tree = asdict(result)
    # As it will be read back, with text for the steps.
    tree = json.loads(json.dumps(tree))
    write_atomically(path, json.dumps({**tree, "sum": _checksum(tree)}).encode())


def _checksum(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def read_result(path: Path) -> Result | None:
    """The result left in a file, or None."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        # Those of older versions have none.
        written = tree.pop("sum", None)
        if written is not None and written != _checksum(tree):
            raise ValueError("its checksum is not what was written")
        tree["scores"] = tree["scores"] and tuple(map(float, tree["scores"]))
        tree["reports"] = {int(step): float(score) for step, score in tree["reports"].items()}
        return Result(**tree)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SearchError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SearchError(f"{path} is damaged: {one_line(error, 100)}; remove it, and its trial is run again") from None


def _told(error: BaseException) -> str:
    # metahpo's own errors are written to be read alone.
    text = (
        f"{type(error).__name__}: {error}"
        if isinstance(error, MetaHPOError)
        else "".join(traceback.format_exception(error))
    )
    return text[-MOST_TEXT:]
