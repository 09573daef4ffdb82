from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass

import optuna
import pytest
import sqlalchemy

from metahpo.errors import SearchError
from metahpo.searchers import Choice, Float, Grid, Int, Outcome, Random, Searcher, Space, Study
from metahpo.searchers.settings import same

SPACE = Space(
    rate=Float(1e-4, 1, log=True),
    momentum=Float(0, 0.9, step=0.1),
    steps=Int(1, 9, step=2),
    filters=Int(4, 64, log=True),
    rule=Choice("sgd", [1, {"a": None}], None, 1, True, 1.0),
    beta=Float(0.5, 1, when={"steps": (1, 3, 5)}),
)


def objective(trial):
    trial.report(0, trial["rate"] / 2)
    if trial.number == 2:
        raise ValueError("diverged")
    return trial["rate"]


@pytest.fixture
def path(tmp_path):
    """A study file with five trials, one of which failed."""
    path = tmp_path / "study.db"
    with Study(SPACE, Random(), path, "maximize", seed=3) as study:
        study.optimize(objective, 5)
    return path


def refused(call) -> str:
    with pytest.raises(SearchError) as raised:
        call()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def again(path, space=SPACE, searcher=Random(), direction="maximize", seed=3, **options):
    with Study(space, searcher, path, direction, seed, **options) as study:
        return study.trials


# Round trips.


def test_what_is_read_is_what_was_written(path):
    with Study(SPACE, Random(), direction="maximize", seed=3) as study:
        study.optimize(objective, 5)
        for kept, expected in zip(again(path), study.trials, strict=True):
            assert same(kept.settings, expected.settings)
            assert (kept.state, kept.scores, kept.reports) == (expected.state, expected.scores, expected.reports)
            assert (kept.error is None) == (expected.error is None)
    with Study.open(path) as opened:
        assert opened.trials == again(path)
        assert opened.space == SPACE
        assert (opened.directions, opened.seed, opened.best.number) == (["maximize"], 3, study.best.number)


def test_spaces_of_all_kinds(tmp_path):
    rng = random.Random(0)
    settings = {}
    for i in range(12):
        low = rng.choice([0.0, -3.7, 1e-12, 123456.789, rng.random()])
        width = 10 ** rng.uniform(-6, 6)
        settings[f"f{i}"] = Float(low, low + width, step=rng.choice([None, width / 3, width / rng.randint(2, 999)]))
        first = rng.randint(1, 10**9)
        settings[f"i{i}"] = Int(first, first + rng.randint(1, 10**6), log=i % 3 == 0, step=None if i % 3 < 2 else 1)
    settings["wide"] = Int(-(2**53), 2**53)
    settings["list"] = Choice([1], "[1]", {"a": [None]})
    space = Space(settings)
    with Study(space, storage=tmp_path / "study.db") as study:
        study.optimize(lambda trial: 1.0, 8)
        asked = [t.settings for t in study.trials]
    with Study.open(tmp_path / "study.db") as study:
        assert same([t.settings for t in study.trials], asked)
        theirs = optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path}/study.db")
        for trial, mine in zip(theirs.trials, asked, strict=True):
            # Optuna has no lists.
            texts = {k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in mine.items()}
            assert trial.params == texts


def test_any_file_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "it's 100%20 {x} of a#b? ü;"
    again_and_again(tmp_path / f"{name}.db")
    again_and_again(f"{name}/study.db")
    assert {p.name for p in tmp_path.iterdir()} <= {f"{name}.db", f"{name}.files", name}


def again_and_again(storage, **options):
    with Study(Space(x=Int(0, 3)), Grid(), storage, **options) as study:
        study.optimize(lambda trial: trial["x"], 2)
    with Study(Space(x=Int(0, 3)), Grid(), storage, **options) as study:
        study.optimize(lambda trial: trial["x"])
    with Study.open(storage, **options) as study:
        assert [t.score for t in study.trials] == [0, 1, 2, 3]


def test_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # As of any database, of which SQLAlchemy has the driver; only files have a lock beside them.
    again_and_again(f"sqlite+pysqlite:///{tmp_path}/other.db")
    again_and_again("sqlite:///relative.db")
    again_and_again(f"sqlite:///{tmp_path}/absolute.db")
    assert {p.name for p in tmp_path.iterdir()} == {
        *("other.db", "relative.db", "absolute.db", "runs", "relative.files", "absolute.files")
    }


def test_several_studies_in_a_file(tmp_path):
    path = tmp_path / "study.db"
    again_and_again(path)
    again_and_again(path, name="second")
    assert "holds no study 'third'; found: study, second" in refused(lambda: Study.open(path, name="third"))


# Optuna's own.


def test_optuna_reads_it(path):
    study = optuna.load_study(study_name="study", storage=f"sqlite:///{path}")
    mine = again(path)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    best = max((t for t in mine if t.scores), key=lambda t: t.score)
    assert (study.best_trial.number, study.best_value) == (best.number, best.score)
    assert study.best_params["rate"] == best.settings["rate"]
    assert study.trials[0].intermediate_values == {0: mine[0].settings["rate"] / 2}
    assert study.trials[0].distributions["filters"] == optuna.distributions.IntDistribution(4, 64, log=True)
    assert "ValueError: diverged" in study.trials[2].user_attrs["error"]
    assert study.trials[0].datetime_complete >= study.trials[0].datetime_start
    importance = optuna.importance.get_param_importances(study, params=["rate", "momentum"])
    assert importance["rate"] > importance["momentum"]


def test_optuna_reads_several_objectives(tmp_path):
    path = tmp_path / "study.db"
    with Study(SPACE, storage=path, direction=["minimize", "maximize"]) as study:
        study.optimize(lambda trial: trial.report(1, 0.5) or (trial["rate"], trial["steps"]), 6)
        front = {t.number for t in study.front}
    assert {t.number for t in optuna.load_study(study_name=None, storage=f"sqlite:///{path}").best_trials} == front


# Refused.


def test_another_search(path):
    for change, said in (
        ({"momentum": Float(0, 0.8, step=0.1)}, "it has {'float': [0.0, 0.9], 'step': 0.1} for 'momentum', asked was"),
        ({"more": Int(0, 1)}, "it has nothing for 'more', asked was {'int': [0, 1]}"),
        ({"rule": Choice("sgd", [1, {"a": None}], None, True, 1, 1.0)}, "for 'rule', asked was"),
    ):
        line = refused(lambda c=change: again(path, Space({**SPACE.settings, **c})))
        assert line.startswith(f"{path} is a study of another space: ")
        assert said in line
    fewer = {name: SPACE[name] for name in SPACE if name != "beta"}
    assert "for 'beta', asked was nothing" in refused(lambda: again(path, Space(fewer)))
    assert "its settings are in the order ['rate'" in refused(
        lambda: again(path, Space(dict(reversed(SPACE.settings.items()))))
    )
    assert "is a study with seed 3, asked was 4" in refused(lambda: again(path, seed=4))
    assert "with directions ['maximize'], asked was ['minimize']" in refused(lambda: again(path, direction="minimize"))
    assert "with searcher Random(), asked was Other(pace=1)" in refused(lambda: again(path, searcher=Other()))
    assert len(again(path)) == 5


@dataclass(frozen=True)
class Other(Searcher):
    pace: int = 1


def test_a_newer_format(path):
    with closing(sqlite3.connect(path)) as database, database:
        ((text,),) = database.execute("SELECT value_json FROM study_user_attributes WHERE key = 'metahpo'").fetchall()
        newer = json.dumps({**json.loads(text), "format": 2})
        database.execute("UPDATE study_user_attributes SET value_json = ? WHERE key = 'metahpo'", (newer,))
    for call in (lambda: again(path), lambda: Study.open(path)):
        assert refused(call) == (
            f"{path}: study 'study' has format 2, of a newer metahpo; this one reads up to 1: upgrade metahpo"
        )


def test_a_newer_optuna(path):
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'v99.0.0'")
    for call in (lambda: again(path), lambda: Study.open(path)):
        assert "pip install -U optuna" in refused(call)


def test_what_is_no_study_file(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("rate,score\n" * 200)
    (tmp_path / "empty").touch()
    with closing(sqlite3.connect(tmp_path / "others")) as database, database:
        database.execute("CREATE TABLE songs (name TEXT)")
    before = {p: p.stat().st_size for p in tmp_path.iterdir()}
    for name, said in {
        "folder": "is a folder, expected a study file",
        "text": "is not a study file: file is not a database",
        "others": "is not a study file: found tables songs",
    }.items():
        for call in (lambda n=name: again(tmp_path / n), lambda n=name: Study.open(tmp_path / n)):
            assert refused(call) == f"{tmp_path / name} {said}"
    assert "is not there, expected a study file" in refused(lambda: Study.open(tmp_path / "missing.db"))
    assert "is not a study file: found an empty database" in refused(lambda: Study.open(tmp_path / "empty"))
    assert {p: p.stat().st_size for p in tmp_path.iterdir()} == before
    # An empty file is a study's to come.
    assert again(tmp_path / "empty") == []


def test_where_nothing_can_be_written():
    assert "study /proc/none/study.db cannot be locked: " in refused(
        lambda: Study(SPACE, storage="/proc/none/study.db")
    )
    assert "cannot be opened as a database: " in refused(lambda: Study.open("nonesuch://host/name"))
    assert "cannot be opened as a database: " in refused(lambda: Study.open("://"))


def test_a_damaged_file(path):
    whole = path.read_bytes()
    for begin in range(4096, len(whole), 16384):
        path.write_bytes(whole[:begin] + b"\xff" * 4096 + whole[begin + 4096 :])
        for call in (lambda: again(path), lambda: Study.open(path)):
            try:
                call()
            except SearchError as error:
                assert "\n" not in str(error)
    path.write_bytes(whole[:5000])
    assert str(path) in refused(lambda: again(path))
    path.write_bytes(whole)
    assert len(again(path)) == 5


def test_optunas_own_study_is_left_alone(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    theirs = optuna.create_study(study_name="study", storage=url)
    theirs.optimize(lambda trial: trial.suggest_float("rate", 0, 1), 3)
    for call in (lambda: again(tmp_path / "study.db"), lambda: Study.open(tmp_path / "study.db")):
        assert "study 'study' was not made by metahpo" in refused(call)
    assert len(optuna.load_study(study_name="study", storage=url).trials) == 3


def test_a_trial_that_optuna_added(path):
    optuna.load_study(study_name="study", storage=f"sqlite:///{path}").enqueue_trial({"rate": 0.5})
    assert "trial 5 of study 'study' was not made by metahpo" in refused(lambda: again(path))


def test_a_study_whose_process_died_as_it_was_made(tmp_path):
    optuna.create_study(study_name="study", storage=f"sqlite:///{tmp_path}/study.db")
    assert again(tmp_path / "study.db") == []


def test_the_files_of_a_study_that_is_gone_are_not_taken_for_its_own(path):
    folder = path.with_suffix(".files")
    with Study(SPACE, Random(), path, "maximize", 3) as study:
        (study.ask().folder / "checkpoint").touch()
    path.unlink()
    assert refused(lambda: again(path)) == f"{folder / 'trials'} is of another study; remove it, or give another folder"
    assert again(path, folder=path.with_name("other")) == []
    path.unlink()
    shutil.rmtree(folder)
    assert again(path) == []


# One process writes.


def test_two_studies_of_one_file_in_a_process(path):
    with Study(SPACE, Random(), path, "maximize", 3):
        line = refused(lambda: again(path))
        assert line.startswith(f"study {path} is in use by process {os.getpid()} on ")
        assert len(Study.open(path).trials) == 5
    assert len(again(path)) == 5
    assert not path.with_name("study.db.lock").exists()


HOLDER = """
import os, time
from metahpo.searchers import *
study = Study(Space(x=Float(0, 1)), storage={path!r})
if os.fork() == 0:
    # A loader of data, which outlives its parent.
    time.sleep(60)
print("held", flush=True)
for i in range(10_000):
    study.tell(study.ask(), 0.5)
"""


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path, start):
    path = tmp_path / "study.db"
    holder = start(HOLDER.format(path=str(path)))
    holder.wait_for("held")
    line = refused(lambda: Study(Space(x=Float(0, 1)), storage=path))
    assert line.startswith(f"study {path} is in use by process {holder.process.pid} on ")
    assert line.endswith("; wait until it has ended, or stop it")
    # To look at it is allowed, at any moment.
    counts = []
    while not counts or counts[-1] < 5:
        with Study.open(path) as study:
            assert all(t.state in ("complete", "running") for t in study.trials)
            counts.append(len(study.trials))
            said = refused(study.ask)
            assert said == f"study {path}: is closed, or was opened to look at; nothing can be added"
    assert counts == sorted(counts)
    holder.process.kill()
    holder.process.join()
    with Study(Space(x=Float(0, 1)), storage=path) as study:
        assert len(study.trials) >= 5
        assert sum(t.state == "running" for t in study.trials) <= 1
        study.optimize(lambda trial: 1.0, len(study.trials))
        assert all(t.state == "complete" for t in study.trials)


def test_another_writer_of_a_database_without_a_lock_is_noticed(tmp_path):
    url = f"sqlite+pysqlite:///{tmp_path}/study.db"
    with (
        Study(SPACE, storage=url, folder=tmp_path / "a") as first,
        Study(SPACE, storage=url, folder=tmp_path / "b") as second,
    ):
        first.ask()
        assert f"{url}: another process has written to study 'study'" in refused(second.ask)


def test_a_full_disk_is_told_in_a_line(path):
    with Study(SPACE, Random(), path, "maximize", 3) as study, closing(sqlite3.connect(path)) as database:
        pages = database.execute("PRAGMA page_count").fetchone()[0]
        study._store._backend.engine.dispose()
        sqlalchemy.event.listen(
            study._store._backend.engine,
            "connect",
            lambda connection, _: connection.execute(f"PRAGMA max_page_count = {pages}"),
        )
        line = refused(lambda: [study.tell(study.ask(), Outcome(0.5, notes={"text": "x" * 9999})) for _ in range(9)])
        assert line == f"{path}: (sqlite3.OperationalError) database or disk is full"
    assert len(again(path)) >= 5
