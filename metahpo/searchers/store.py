"""A study's trials in a database, by Optuna's storage; written by one process alone."""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from decimal import Decimal
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from metahpo.errors import SearchError, StudyFileError, one_line
from metahpo.searchers.executors.base import Result
from metahpo.searchers.records import TrialRecord, plain
from metahpo.searchers.settings import Choice, Float, Int, Setting
from metahpo.searchers.space import Space

# What is kept of a study and a trial beside what Optuna knows; a larger number of a newer metahpo is refused.
FORMAT = 1
DIRECTIONS = {"minimize": StudyDirection.MINIMIZE, "maximize": StudyDirection.MAXIMIZE}
BUSY_SECONDS = 60.0
STATES = {TrialState.COMPLETE: "complete", TrialState.FAIL: "failed", TrialState.RUNNING: "running"}

F = TypeVar("F", bound=Callable[..., Any])


def _in_one_line(method: F) -> F:
    """The database's errors (damaged, locked, full, gone) as a StudyFileError."""

    @wraps(method)
    def wrapped(self: StudyStore, *args: Any, **options: Any) -> Any:
        try:
            return method(self, *args, **options)
        except (SQLAlchemyError, StorageInternalError) as error:
            raise StudyFileError(f"{self.storage}: {_said(error.__cause__ or error)}") from error

    return wrapped  # type: ignore[return-value]


def _whole(method: F) -> F:
    """Whatever reading a damaged database ends by, as a SearchError."""

    @wraps(method)
    def wrapped(self: StudyStore, *args: Any, **options: Any) -> Any:
        try:
            return method(self, *args, **options)
        except SearchError:
            raise
        # Optuna turns rows into dates, states, distributions and JSON, each with errors of its own.
        except Exception as error:
            raise SearchError(
                f"{self.storage}: study {self.name!r} is damaged: {type(error).__name__}: {one_line(error, 120)}"
            ) from error

    return wrapped  # type: ignore[return-value]


class StudyStore:
    """One study of a database.

    storage: the path of an SQLite file, a database URL that SQLAlchemy knows, or None for memory. make: whether the
    file and its tables are made if they are not there. kept: what the study is made of (space, directions, seed, ...),
    in plain values. Raises SearchError.
    """

    def __init__(self, storage: str | Path | None, name: str, make: bool = True):
        self.storage, self.name = storage, name
        self._backend = _open(storage, make)
        self._study: int | None = None
        self._ids: dict[int, int] = {}
        self._sums: dict[int, str | None] = {}

    @_whole
    @_in_one_line
    def exists(self) -> bool:
        """Whether the study is there; one whose process died while it made it is not, and is removed."""
        for study in self._backend.get_all_studies():
            if study.study_name != self.name:
                self._check_name(study.study_name, study.user_attrs.get("metahpo"))
                continue
            if "metahpo" in study.user_attrs or self._backend.get_all_trials(study._study_id, deepcopy=False):
                return True
            self._backend.delete_study(study._study_id)
        return False

    @_in_one_line
    def create(self, kept: Mapping[str, Any]) -> None:
        directions = [DIRECTIONS[d] for d in kept["directions"]]
        self._study = self._backend.create_new_study(directions, self.name)
        self.set_kept(kept)

    @_whole
    @_in_one_line
    def kept(self) -> dict[str, Any]:
        """What ``create`` was given; raises SearchError for a study of another program or a newer version."""
        names = [study.study_name for study in self._backend.get_all_studies()]
        if self.name not in names:
            raise SearchError(f"{self.storage} holds no study {self.name!r}; found: {', '.join(names) or 'none'}")
        self._study = self._backend.get_study_id_from_name(self.name)
        kept = self._backend.get_study_user_attrs(self._study).get("metahpo")
        if kept is None:
            raise SearchError(f"{self.storage}: study {self.name!r} was not made by metahpo")
        if kept["format"] > FORMAT:
            raise SearchError(
                f"{self.storage}: study {self.name!r} has format {kept['format']}, of a newer metahpo; "
                f"this one reads up to {FORMAT}: upgrade metahpo"
            )
        kept = dict(kept)
        if "sum" in kept and kept.pop("sum") != checksum(kept):
            raise SearchError(f"{self.storage}: study {self.name!r} is damaged: its checksum is not what was written")
        self._check_name(self.name, kept)
        if list(self._backend.get_study_directions(self._study)) != [DIRECTIONS[d] for d in kept["directions"]]:
            raise SearchError(f"{self.storage}: study {self.name!r} is damaged: its directions differ")
        return kept

    def _check_name(self, name: str, kept: Mapping[str, Any] | None) -> None:
        """Raises SearchError for a study by another name than it was made by: it would be begun a second time."""
        if kept and kept.get("name", name) != name:
            raise SearchError(f"{self.storage}: is damaged: study {kept['name']!r} is named {name!r}")

    @_in_one_line
    def set_kept(self, kept: Mapping[str, Any]) -> None:
        assert self._study is not None
        written = {**plain(kept), "format": FORMAT, "name": self.name}
        written.pop("sum", None)
        self._backend.set_study_user_attr(self._study, "metahpo", {**written, "sum": checksum(written)})

    @_whole
    @_in_one_line
    def records(self, space: Space) -> list[TrialRecord]:
        """All trials, by number."""
        assert self._study is not None
        trials = self._backend.get_all_trials(self._study, deepcopy=False)
        self._ids = {trial.number: trial._trial_id for trial in trials}
        self._sums = {trial.number: trial.user_attrs.get("metahpo", {}).get("sum") for trial in trials}
        for trial in trials:
            if "metahpo" not in trial.user_attrs:
                raise SearchError(
                    f"{self.storage}: trial {trial.number} of study {self.name!r} was not made by metahpo"
                )
        if [trial.number for trial in trials] != list(range(len(trials))):
            raise SearchError(f"{self.storage}: study {self.name!r} is damaged: trials are missing")
        records = [_record(trial, space) for trial in trials]
        for record, trial in zip(records, trials):
            self._check(record, trial)
        return records

    def _check(self, record: TrialRecord, trial: FrozenTrial) -> None:
        """Raises SearchError unless the trial is as it was written; those of older versions have no checksums."""
        kept, result = dict(trial.user_attrs["metahpo"]), dict(trial.user_attrs.get("result", {}))
        asked = kept.pop("sum", None)
        whole = asked is None or asked == checksum([self.name, record.number, kept])
        if record.state != "running" and asked is not None:
            written = result.pop("sum", None)
            ending = _ending(asked, record.scores, record.error, result, record.reports)
            whole = whole and written == checksum(ending)
        deaths = trial.user_attrs.get("deaths")
        if isinstance(deaths, dict):
            deaths = dict(deaths)
            whole = whole and deaths.pop("sum", None) == checksum([asked, deaths])
        if not whole:
            raise SearchError(f"{self.storage}: trial {record.number} is damaged: its checksum is not what was written")

    @_in_one_line
    def add(self, record: TrialRecord, space: Space) -> int:
        """A new trial, at work, in one transaction; gives its number."""
        assert self._study is not None
        kept = plain({key: getattr(record, key) for key in ("settings", "budget", "parent", "notes", "clock")})
        kept["sum"] = self._sums[record.number] = checksum([self.name, record.number, kept])
        # Those that a dashboard's table should show.
        shown = {key: kept[key] for key in ("budget", "parent") if kept[key] is not None}
        template = create_trial(
            state=TrialState.RUNNING,
            params={name: _parameter(space[name], value) for name, value in record.settings.items()},
            distributions={name: distribution(space[name]) for name in record.settings},
            user_attrs={"metahpo": kept, **shown},
        )
        trial = self._backend.create_new_trial(self._study, template)
        number = self._backend.get_trial_number_from_id(trial)
        self._ids[number] = trial
        return number

    @_in_one_line
    def report(self, number: int, step: int, score: float) -> None:
        self._backend.set_trial_intermediate_value(self._ids[number], step, score)

    @_in_one_line
    def died(self, record: TrialRecord) -> None:
        deaths = {"count": record.deaths, "stalled": record.stalled, "reached": record.reached}
        written = {**deaths, "sum": checksum([self._sums[record.number], deaths])}
        self._backend.set_trial_user_attr(self._ids[record.number], "deaths", written)

    @_in_one_line
    def end(self, number: int, result: Result, reports: Mapping[int, float]) -> None:
        """Ends a trial that is at work; the state comes last, so that it has ended whole or not at all."""
        trial = self._ids[number]
        details = plain({"seconds": result.seconds, "gradients": result.gradients, "notes": result.notes})
        asked = self._sums[number]
        if asked is not None:
            details["sum"] = checksum(_ending(asked, result.scores, result.error, details, reports))
        self._backend.set_trial_user_attr(trial, "result", details)
        if result.error is not None:
            self._backend.set_trial_user_attr(trial, "error", result.error)
        state = TrialState.FAIL if result.scores is None else TrialState.COMPLETE
        self._backend.set_trial_state_values(trial, state, result.scores)

    def close(self) -> None:
        if isinstance(self._backend, RDBStorage):
            self._backend.remove_session()
            self._backend.engine.dispose()


def checksum(tree: Any) -> str:
    """Of plain values, however they are ordered."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def _ending(
    asked: str,
    scores: Sequence[float] | None,
    error: str | None,
    details: Mapping[str, Any],
    reports: Mapping[int, float],
) -> list[Any]:
    """What the checksum of a trial that has ended is of; databases know no negative zero."""
    values = None if scores is None else [score + 0.0 for score in scores]
    return [asked, values, error, details, sorted([step, score + 0.0] for step, score in reports.items())]


def distribution(setting: Setting) -> BaseDistribution:
    """Optuna's distribution of a setting's values."""
    if isinstance(setting, Float):
        if setting.step is None:
            return FloatDistribution(setting.low, setting.high, log=setting.log)
        # Optuna wants the last step to end the range, and finds steps by division.
        low, high, step = setting.low, setting.at(1.0), setting.step
        exact = (Decimal(repr(high)) - Decimal(repr(low))) % Decimal(repr(step)) == 0
        return FloatDistribution(low, high, step=step if exact and max(abs(low), abs(high)) < 1e7 * step else None)
    if isinstance(setting, Int):
        return IntDistribution(setting.low, setting.at(1.0), log=setting.log, step=setting.step or 1)
    assert isinstance(setting, Choice)
    return CategoricalDistribution([_parameter(setting, option) for option in setting.options])


def _parameter(setting: Setting, value: Any) -> Any:
    """The value as Optuna writes it: lists and dicts as text."""
    return json.dumps(value) if isinstance(setting, Choice) and isinstance(value, (list, dict)) else value


def _record(trial: FrozenTrial, space: Space) -> TrialRecord:
    kept, result = trial.user_attrs["metahpo"], trial.user_attrs.get("result", {})
    clock, deaths = kept["clock"], trial.user_attrs.get("deaths", 0)
    # A number alone in studies of older versions.
    if not isinstance(deaths, dict):
        deaths = {"count": deaths, "stalled": deaths, "reached": -1}
    return TrialRecord(
        number=trial.number,
        settings={name: kept["settings"][name] for name in space if name in kept["settings"]},
        state=STATES[trial.state],  # type: ignore[arg-type]
        scores=tuple(trial.values) if trial.state is TrialState.COMPLETE else None,
        error=trial.user_attrs.get("error"),
        budget=kept["budget"],
        parent=kept["parent"],
        notes={**kept["notes"], **result.get("notes", {})},
        proposed=kept["notes"],
        gradients=result.get("gradients", {}),
        reports=dict(trial.intermediate_values),
        seconds=result.get("seconds"),
        deaths=deaths["count"],
        stalled=deaths["stalled"],
        reached=deaths["reached"],
        clock=(clock[0], clock[1], int(clock[2])) if clock else None,
    )


def _open(storage: str | Path | None, make: bool) -> BaseStorage:
    # Optuna's notes on each study and trial, and Alembic's on the tables, are not for our users.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if storage is None:
        return InMemoryStorage()
    path = sqlite_path(storage)
    try:
        if path is None:
            return RDBStorage(str(storage), skip_table_creation=not make)
        if path.exists() or not make:
            _check_file(path, make)
        # Braces are Optuna's own templates. A reader, such as a dashboard, may hold the file for a moment.
        url = str(URL.create("sqlite", database=str(path.absolute()))).replace("{", "{{").replace("}", "}}")
        return RDBStorage(url, {"connect_args": {"timeout": BUSY_SECONDS}}, skip_table_creation=not make)
    except SearchError:
        raise
    except Exception as error:  # SQLAlchemy's, Alembic's and the drivers' have no common base.
        what = "is not a study file" if path else "cannot be opened as a database"
        raise SearchError(f"{storage} {what}: {_said(error)}") from error


def _check_file(path: Path, make: bool) -> None:
    """Raises SearchError for what is no study file, before Optuna makes its tables in it."""
    if not path.is_file():
        raise SearchError(f"{path} is {'a folder' if path.is_dir() else 'not there'}, expected a study file")
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        found = [row[0] for row in database.execute("PRAGMA integrity_check(1)")]
        strays = database.execute("PRAGMA foreign_key_check").fetchone() if found == ["ok"] else None
    if "studies" in tables and (found != ["ok"] or strays):
        what = one_line(found[0], 120) if found != ["ok"] else f"a row of {strays[0]} belongs to nothing"
        raise SearchError(f"{path} is a damaged study file: {what}")
    if "studies" not in tables and (tables or not make):
        found = f"tables {', '.join(sorted(tables))}" if tables else "an empty database"
        raise SearchError(f"{path} is not a study file: found {found:.200}")


def _said(error: BaseException) -> str:
    """What an error of a database says, without the statement and the reference that SQLAlchemy appends."""
    return one_line(error).partition(" [SQL")[0].partition(" (Background on")[0]


def sqlite_path(storage: str | Path) -> Path | None:
    """The file of a storage that is one; None for the URL of another database."""
    text = str(storage)
    if text.startswith("sqlite:///"):
        return Path(text.removeprefix("sqlite:///"))
    return None if "://" in text else Path(text)
