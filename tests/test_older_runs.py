"""Runs that an older metahpo left (0.1.0, commit 73d7ffc) go on, are tested and reported.

tests/fixtures/runs.tar.xz holds a training of MAML++ stopped after 2 of 4 epochs, a tuning of rates stopped after 2 of
3 outer steps, with the module of its data, and a finished search of 3 trials, without their pictures.
"""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

import pytest

from metahpo import __version__
from metahpo.cli import main
from metahpo.runs.files import read_json
from metahpo.searchers import Study
from metahpo.training.metrics import CsvLog

RUNS = Path(__file__).resolve().parent / "fixtures" / "runs.tar.xz"


@pytest.fixture
def here(tmp_path, monkeypatch):
    with tarfile.open(RUNS) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("write_report", "tuning.write_tuning_report", "search.write_search_report"):
        monkeypatch.setattr(f"metahpo.report.{name}", lambda run_dir, *rest: run_dir)
    yield tmp_path
    sys.modules.pop("synthetic", None)


def test_a_training_goes_on_to_the_figures_of_the_older_version(here, capsys):
    assert main(["train", "--resume", "train"]) == 0
    err = capsys.readouterr().err
    assert "fingerprint.json is not there" in err
    assert f"begun with metahpo 0.1.0, now {__version__}: figures may differ\n" in err
    rows = CsvLog(here / "train" / "metrics.csv").read()
    # The older version's own figures of the whole run.
    for name, expected in (
        ("train_loss", [7.654585480690002, 7.012831687927246, 5.4033520221710205, 0.4028574414551258]),
        ("val_loss", [2.2053885459899902, 2.207220137119293, 2.210305631160736, 2.212741047143936]),
    ):
        assert [row[name] for row in rows] == pytest.approx(expected, rel=1e-4)


def test_a_training_is_tested_and_reported(here, capsys):
    assert main(["evaluate", "train"]) == 0
    assert main(["report", "train"]) == 0
    # As the older version tested it, to rounding; its file is left as it is where the digits differ.
    files = {path.name: read_json(path) for path in (here / "train").glob("test*.json")}
    for content in files.values():
        assert content["rows"]["best"]["loss"] == pytest.approx(3.6318737268447876, rel=1e-4)
    assert "loss 3.6319" in capsys.readouterr().out


def test_a_tuning_goes_on(here, capsys):
    assert main(["tune", "rates", "--resume", "tune"]) == 0
    assert "resuming tune: at outer step 3" in capsys.readouterr().out
    last = CsvLog(here / "tune" / "metrics.csv").read()[-1]
    # What the checkpoint held: those of the older version's third step.
    assert last["mean_lr"] == pytest.approx(0.05884895473718643, rel=1e-6)
    assert last["mean_momentum"] == pytest.approx(0.9137343168258667, rel=1e-6)


def test_a_search_goes_on_and_is_reported(here, capsys):
    def trials() -> dict[int, float]:
        with Study.open(here / "search" / "study.db") as study:
            return {record.number: record.score for record in study.trials}

    before = trials()
    assert main(["report", "search"]) == 0
    assert main(["search", "--resume", "search", "search.trials=4"]) == 0
    assert "best: trial 3" in capsys.readouterr().out
    assert before == {number: score for number, score in trials().items() if number < 3}
    assert before == pytest.approx({0: 2.1855, 1: 2.1032, 2: 2.2208}, abs=1e-4)
    (here / "search" / "versions.json").unlink()
    assert main(["report", "search"]) == 0
    assert "search/versions.json is not there: left out of the report\n" in capsys.readouterr().err
