"""Damage and the machine's faults: a line that names the file, never a wrong figure or a lost trial."""

from __future__ import annotations

import errno
import json
import os
import random
import sqlite3
from contextlib import closing

import pytest
from sqlalchemy.exc import OperationalError

from metahpo.errors import CheckpointError, SearchError
from metahpo.searchers import Float, Random, Space, Study
from metahpo.searchers.executors.base import Died, Executor, Finished, Reported, Result, run_job, write_result

SPACE = Space(x=Float(0, 1))


def refused(call) -> str:
    with pytest.raises(SearchError) as raised:
        call()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def figures(path):
    with Study.open(path) as study:
        return study.space, study.directions, study.seed, study.trials


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The bytes of a study of three trials, of which one failed, and what it says."""
    path = tmp_path_factory.mktemp("study") / "study.db"

    def objective(trial):
        trial.report(1, -0.0)
        if trial.number == 1:
            raise ValueError("diverged")
        return -0.0 if trial.number else trial["x"]

    with Study(SPACE, storage=path) as study:
        study.optimize(objective, 3)
    return path.read_bytes(), figures(path)


@pytest.mark.parametrize("seed", range(8))
def test_a_bit_flipped_in_a_study_gives_a_line_or_has_no_effect(seed, content, tmp_path):
    whole, expected = content
    path, draws = tmp_path / "study.db", random.Random(seed)
    place = draws.choice([i for i, byte in enumerate(whole) if byte])
    damaged = bytearray(whole)
    damaged[place] ^= 1 << draws.randrange(8)
    path.write_bytes(damaged)
    try:
        found = figures(path)
    except SearchError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert found == expected


EDITS = {
    "a score": "UPDATE trial_values SET value = value + 0.5",
    "a report": "UPDATE trial_intermediate_values SET intermediate_value = 7",
    "a setting": "UPDATE trial_user_attributes SET value_json = replace(value_json, '\"x\": 0.', '\"x\": 0.1')",
    "an error": "UPDATE trial_user_attributes SET value_json = '\"another\"' WHERE key = 'error'",
    "seconds": "UPDATE trial_user_attributes SET value_json = replace(value_json, '\"seconds\": ', '\"seconds\": 1')",
    "no JSON": "UPDATE trial_user_attributes SET value_json = '{' WHERE key = 'result'",
    "a state": "UPDATE trials SET state = 'FAIM'",
    "a failure": "UPDATE trials SET state = 'FAIL'",
    "a number": "UPDATE trials SET number = 5 WHERE number = 2",
    "an owner": "UPDATE trials SET study_id = 9 WHERE number = 2",
    "a direction": "UPDATE study_directions SET direction = 'MAXIMIZE'",
    "the seed": "UPDATE study_user_attributes SET value_json = replace(value_json, '\"seed\": 0', '\"seed\": 1')",
    "the name": "UPDATE studies SET study_name = 'stuey'",
}


@pytest.mark.parametrize("edit", EDITS)
def test_each_figure_of_a_study_is_checked(edit, content, tmp_path):
    path = tmp_path / "study.db"
    path.write_bytes(content[0])
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(EDITS[edit])
    assert str(path) in refused(lambda: figures(path))
    with pytest.raises(SearchError):
        Study(SPACE, storage=path)


def test_a_study_of_the_version_before_opens(content, tmp_path):
    path = tmp_path / "study.db"
    path.write_bytes(content[0])
    with closing(sqlite3.connect(path)) as database, database:
        for table in ("trial_user_attributes", "study_user_attributes"):
            for key, text in database.execute(f"SELECT rowid, value_json FROM {table}").fetchall():
                value = json.loads(text)
                if isinstance(value, dict):
                    value = {k: v for k, v in value.items() if k not in ("sum", "name")}
                    database.execute(f"UPDATE {table} SET value_json = ? WHERE rowid = ?", (json.dumps(value), key))
    assert figures(path) == content[1]
    with Study(SPACE, storage=path) as study:
        study.optimize(lambda trial: 0.5, 4)
    assert figures(path)[-1][:3] == content[1][-1]


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", "null", "\xff", '"scores"', "bit"])
def test_a_damaged_result_is_told_and_is_run_again_once_removed(damage, tmp_path):
    with Study(SPACE, Random(), tmp_path / "study.db") as study:
        path = study.job(study.ask().number).result
        path.parent.mkdir(parents=True)
        write_result(path, Result((0.25,), reports={1: 0.5}))
        text = path.read_text()
        path.write_text(text.replace("0.25", "0.75") if damage == "bit" else damage, encoding="latin-1")
        said = refused(lambda: study.optimize(lambda trial: 0.5, 1))
        assert said.startswith(f"{path} is damaged: ") and said.endswith("remove it, and its trial is run again")
        path.unlink()
        assert study.optimize(lambda trial: 0.5, 1).score == 0.5


FAULTS = {
    "full": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "there/kept"),
    "forbidden": PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
    "damaged": CheckpointError("no whole checkpoint in there"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_machines_faults_stop_the_search_and_are_tried_again(fault, tmp_path):
    def objective(trial):
        if broken:
            raise FAULTS[fault]
        return 0.5

    broken = True
    with Study(SPACE, Random(), tmp_path / "study.db") as study:
        said = refused(lambda: study.optimize(objective, 2))
        assert said.startswith("stopped at trial 0, which is tried again when the search is gone on with: ")
        assert {"full": "there/kept: No space", "forbidden": "00000: Permission", "damaged": "whole"}[fault] in said
        assert [trial.state for trial in study.trials] == ["running"]
    broken = False
    with Study(SPACE, Random(), tmp_path / "study.db") as study:
        study.optimize(objective, 2)
        assert [(trial.score, trial.deaths) for trial in study.trials] == [(0.5, 0)] * 2


class Dying(Executor):
    """Dies after each step of a trial, of which each attempt does one more, up to ``most``."""

    def __init__(self, most):
        self.most = most

    def start(self, objective, folder):
        self.objective, self.jobs = objective, []

    def submit(self, job):
        self.jobs.append(job)

    def wait(self, emit, seconds):
        job = self.jobs.pop()
        emit(Reported(job.number, min(job.attempt, self.most), 0.5))
        if job.attempt < 6:
            emit(Died(job.number, "killed by SIGKILL"))
        else:
            emit(Finished(job.number, run_job(self.objective, job, lambda *_: None)))

    def stop(self, grace):
        self.jobs.clear()


def test_a_trial_that_gets_further_each_time_is_not_lost(tmp_path):
    with Study(SPACE, Random(), tmp_path / "study.db") as study:
        study.optimize(lambda trial: 1.0, 1, Dying(9), max_attempts=3)
        study.optimize(lambda trial: 1.0, 2, Dying(1), max_attempts=3)
        assert [(t.state, t.deaths) for t in study.trials] == [("complete", 6), ("failed", 4)]
    assert [trial.deaths for trial in figures(tmp_path / "study.db")[-1]] == [6, 4]


def test_what_the_scores_depend_on_may_not_change(tmp_path):
    context = {"run": {"training": {"epochs": 3}}}
    for _ in range(2):
        Study(SPACE, storage=tmp_path / "study.db", context=context).close()
    other = {"run": {"training": {"epochs": 5}}}
    said = refused(lambda: Study(SPACE, storage=tmp_path / "study.db", context=other))
    assert "study.db is a search with run.training.epochs 3, asked was 5; set it back" in said


def test_an_objective_that_changes_the_directory_keeps_its_files(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def objective(trial):
        os.chdir(tmp_path / "elsewhere")
        (trial.folder / "kept").touch()
        return 0.5

    with Study(SPACE, storage="study.db") as study:
        study.optimize(objective, 2)
        assert os.getcwd() == str(tmp_path)
        os.chdir(tmp_path / "elsewhere")
        study.tell(study.ask(), 1.0)
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "study.db", "study.files"}
    assert not list((tmp_path / "elsewhere").iterdir())
    assert len(figures(tmp_path / "study.db")[-1]) == 3


def test_a_database_that_cannot_take_a_report_stops_the_search_and_fails_no_trial(tmp_path, monkeypatch):
    def full(*values):
        raise OperationalError("", {}, sqlite3.OperationalError("database or disk is full"))

    def objective(trial):
        trial.report(1, 0.5)
        return 0.5

    with Study(SPACE, storage=tmp_path / "study.db") as study:
        monkeypatch.setattr(study._store._backend, "set_trial_intermediate_value", full)
        with pytest.raises(SearchError, match=r"stopped at trial 0, which is tried again .*: .*disk is full"):
            study.optimize(objective, trials=1)
        monkeypatch.undo()
        assert [trial.state for trial in study.trials] == ["running"]
        study.optimize(objective, trials=1)
        assert [(trial.state, dict(trial.reports)) for trial in study.trials] == [("complete", {1: 0.5})]
