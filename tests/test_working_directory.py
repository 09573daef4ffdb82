"""Runs whose own code changes the working directory: paths are meant from where the command was begun."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from metahpo.cli import main
from metahpo.config_data import DatasetSettings, FolderSettings
from metahpo.config_file import located

OWN = """
import os
from torch import nn


class Net(nn.Module):
    # Goes elsewhere when it is made and whenever it is called.
    def __init__(self, in_shape, out_features):
        super().__init__()
        size = 1
        for length in in_shape:
            size *= length
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(size, out_features))
        os.chdir(os.environ["ELSEWHERE"])

    def forward(self, x):
        os.chdir(os.environ["ELSEWHERE"])
        return self.layers(x)


def objective(trial):
    os.chdir(os.environ["ELSEWHERE"])
    (trial.folder / "note").write_text("here")
    return trial["x"]
"""
TRAIN = """
data: {source: folder, root: pictures, size: 4, channels: 1, ways: 2, shots: 1, queries: 1}
net: own_net:Net
learner: {name: maml, steps: 1, inner_lr: 0.01}
training: {epochs: 2, iterations: 1, tasks: 1, val_tasks: 2, test_tasks: 2, keep_best: 1, engine: loop, device: cpu}
run_dir: out
"""
TUNE = """
data: {source: digits, train: 20, val: 10, test: 10}
net: own_net:Net
device: cpu
tune: {steps: 2, phases: 1, iterations: 2, batch: 5}
run_dir: out
"""
SEARCH = """
space: {x: {int: [1, 2]}}
searcher: grid
objective: own_net:objective
search: {direction: minimize}
run_dir: out
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for path in (folder, elsewhere):
        path.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ELSEWHERE", str(elsewhere))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name, text in (("own_net.py", OWN), ("train.yaml", TRAIN), ("tune.yaml", TUNE), ("search.yaml", SEARCH)):
        (folder / name).write_text(text)
    yield folder
    assert list(elsewhere.iterdir()) == [], "nothing is written elsewhere"
    sys.modules.pop("own_net", None)


def test_a_training_reads_and_writes_where_it_was_begun(here, monkeypatch, capsys):
    monkeypatch.setattr("metahpo.report.write_report", lambda run_dir, learner, task: run_dir)
    for number, split in enumerate(("train", "train", "val", "val", "test", "test")):
        for shade in (0, 99):
            path = here / "pictures" / split / f"class{number}" / f"{shade}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), 20 * number + shade).save(path)
    assert main(["train", "train.yaml", "--until-epoch", "1"]) == 0
    assert Path.cwd().name == "elsewhere"
    assert "root: pictures\n" in (here / "out" / "config.yaml").read_text(), "as the user wrote it"
    for command in (["train", "--resume", "out"], ["evaluate", "out"]):
        monkeypatch.chdir(here)
        assert main(command) == 0, capsys.readouterr().err
    assert len((here / "out" / "metrics.csv").read_text().splitlines()) == 3
    assert (here / "out" / "test.json").exists()


def test_a_tuning_writes_where_it_was_begun(here, monkeypatch, capsys):
    monkeypatch.setattr("metahpo.report.tuning.write_tuning_report", lambda run_dir, result, title: run_dir)
    assert main(["tune", "rates", "tune.yaml", "--until", "1"]) == 0
    assert Path.cwd().name == "elsewhere"
    monkeypatch.chdir(here)
    assert main(["tune", "rates", "--resume", "out"]) == 0, capsys.readouterr().err
    assert {"test.json", "result.pt", "metrics.csv"} <= {path.name for path in (here / "out").iterdir()}


def test_a_search_writes_where_it_was_begun(here, monkeypatch):
    monkeypatch.setattr("metahpo.report.search.write_search_report", lambda run_dir, study: run_dir)
    assert main(["search", "search.yaml"]) == 0
    assert "x: 1\n" in (here / "out" / "best.yaml").read_text()
    assert (here / "out" / "study.files" / "trials" / "00001" / "note").exists()


def test_paths_of_settings_become_absolute_and_the_arguments_of_own_functions_stay(tmp_path):
    episodes = {"ways": 2, "shots": 1, "queries": 1}
    assert located(FolderSettings(source="folder", root="a", **episodes), tmp_path).root == tmp_path / "a"
    for dataset, root in (("Omniglot", str(tmp_path / "a")), ("own:images", "a")):
        settings = DatasetSettings(source="dataset", dataset=dataset, args={"root": "a"}, **episodes)
        assert located(settings, tmp_path).args == {"root": root}
