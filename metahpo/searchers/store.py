"""A study's trials in a database, by Optuna's storage; written by one process alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from metahpo.errors import SearchError, one_line
from metahpo.searchers.executors.base import Result
from metahpo.searchers.records import TrialRecord
from metahpo.searchers.settings import Choice, Float, Int, Setting
from metahpo.searchers.space import Space

# What is kept of a study and a trial beside what Optuna knows; a larger number of a newer metahpo is refused.
FORMAT = 1
DIRECTIONS = {"minimize": StudyDirection.MINIMIZE, "maximize": StudyDirection.MAXIMIZE}
STATES = {TrialState.COMPLETE: "complete", TrialState.FAIL: "failed", TrialState.RUNNING: "running"}


class StudyStore:
    """One study of a database.

    storage: the path of an SQLite file, a database URL that SQLAlchemy knows, or None for memory. kept: what the study
    is made of (space, directions, seed, ...), in plain values.
    """

    def __init__(self, storage: str | Path | None, name: str):
        self.storage, self.name = storage, name
        self._backend = _open(storage)
        self._study: int | None = None
        self._ids: dict[int, int] = {}

    def exists(self) -> bool:
        """Whether the study is there, with what it is made of."""
        return any(s.study_name == self.name and "metahpo" in s.user_attrs for s in self._backend.get_all_studies())

    def create(self, kept: Mapping[str, Any]) -> None:
        directions = [DIRECTIONS[d] for d in kept["directions"]]
        # One whose process died between the two lines has no trial yet.
        for study in self._backend.get_all_studies():
            if study.study_name == self.name:
                self._backend.delete_study(study._study_id)
        self._study = self._backend.create_new_study(directions, self.name)
        self._backend.set_study_user_attr(self._study, "metahpo", {"format": FORMAT, **kept})

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
        return kept

    def set_kept(self, kept: Mapping[str, Any]) -> None:
        assert self._study is not None
        self._backend.set_study_user_attr(self._study, "metahpo", {"format": FORMAT, **kept})

    def records(self, space: Space) -> list[TrialRecord]:
        """All trials, by number."""
        assert self._study is not None
        trials = self._backend.get_all_trials(self._study, deepcopy=False)
        self._ids = {trial.number: trial._trial_id for trial in trials}
        return [_record(trial, space) for trial in trials]

    def add(self, record: TrialRecord, space: Space) -> int:
        """A new trial, at work, in one transaction; gives its number."""
        assert self._study is not None
        kept = {key: getattr(record, key) for key in ("settings", "budget", "parent", "notes", "clock")}
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

    def report(self, number: int, step: int, score: float) -> None:
        self._backend.set_trial_intermediate_value(self._ids[number], step, score)

    def died(self, number: int, deaths: int) -> None:
        self._backend.set_trial_user_attr(self._ids[number], "deaths", deaths)

    def end(self, number: int, result: Result) -> None:
        """Ends a trial that is at work; the state comes last, so that it has ended whole or not at all."""
        trial = self._ids[number]
        details = {"seconds": result.seconds, "gradients": result.gradients, "notes": result.notes}
        self._backend.set_trial_user_attr(trial, "result", details)
        if result.error is not None:
            self._backend.set_trial_user_attr(trial, "error", result.error)
        state = TrialState.FAIL if result.scores is None else TrialState.COMPLETE
        self._backend.set_trial_state_values(trial, state, result.scores)

    def optuna_study(self) -> optuna.Study:
        """The study as Optuna's own, for its pictures and measures of importance."""
        return optuna.Study(self.name, self._backend)

    def close(self) -> None:
        if isinstance(self._backend, RDBStorage):
            self._backend.remove_session()
            self._backend.engine.dispose()


def distribution(setting: Setting) -> BaseDistribution:
    """Optuna's distribution of a setting's values."""
    if isinstance(setting, Float):
        # Optuna wants the last step to end the range.
        high = setting.high if setting.step is None else setting.values()[-1]
        return FloatDistribution(setting.low, high, log=setting.log, step=setting.step)
    if isinstance(setting, Int):
        high = setting.high if setting.log else setting.values()[-1]
        return IntDistribution(setting.low, high, log=setting.log, step=setting.step or 1)
    assert isinstance(setting, Choice)
    return CategoricalDistribution([_parameter(setting, option) for option in setting.options])


def _parameter(setting: Setting, value: Any) -> Any:
    """The value as Optuna writes it: lists and dicts as text."""
    return json.dumps(value) if isinstance(setting, Choice) and isinstance(value, (list, dict)) else value


def _record(trial: FrozenTrial, space: Space) -> TrialRecord:
    kept, result = trial.user_attrs["metahpo"], trial.user_attrs.get("result", {})
    clock = kept["clock"]
    return TrialRecord(
        number=trial.number,
        settings={name: kept["settings"][name] for name in space if name in kept["settings"]},
        state=STATES[trial.state],  # type: ignore[arg-type]
        scores=tuple(trial.values) if trial.state is TrialState.COMPLETE else None,
        error=trial.user_attrs.get("error"),
        budget=kept["budget"],
        parent=kept["parent"],
        notes={**kept["notes"], **result.get("notes", {})},
        gradients=result.get("gradients", {}),
        reports=dict(trial.intermediate_values),
        seconds=result.get("seconds"),
        deaths=trial.user_attrs.get("deaths", 0),
        clock=(clock[0], clock[1], int(clock[2])) if clock else None,
    )


def _open(storage: str | Path | None) -> BaseStorage:
    # Optuna's notes on each study and trial, and Alembic's on the tables, are not for our users.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if storage is None:
        return InMemoryStorage()
    path = sqlite_path(storage)
    if path:
        if path.is_dir():
            raise SearchError(f"{path} is a folder, expected a study file")
        path.parent.mkdir(parents=True, exist_ok=True)
    url = f"sqlite:///{path}" if path else str(storage)
    try:
        # A reader, such as a dashboard, may hold the file for a moment.
        return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}} if path else None)
    except Exception as error:  # SQLAlchemy's, Alembic's and the drivers' have no common base.
        what = "is not a study file" if path else "cannot be opened as a database"
        raise SearchError(f"{storage} {what}: {one_line(error).partition(' [SQL')[0]}") from error


def sqlite_path(storage: str | Path) -> Path | None:
    """The file of a storage that is one; None for the URL of another database."""
    text = str(storage)
    if text.startswith("sqlite:///"):
        return Path(text.removeprefix("sqlite:///"))
    return None if "://" in text else Path(text)
