"""``metahpo search``: what it leaves, stopping and going on, bad input."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import sys
from pathlib import Path

import optuna
import pytest
import torch
import yaml

from metahpo.cli import main
from metahpo.config_file import load_config
from metahpo.runs.files import read_json, write_json
from metahpo.searchers import Choice, Float, Space, Study
from metahpo.training.checkpoint import CheckpointStore, position

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

SEARCH = """
run:
  data: {source: sinusoid, shots: 5, queries: 5, eval_queries: 5}
  net: {name: mlp, hidden: [8]}
  learner: {name: maml, steps: 1}
  training: {epochs: 3, iterations: 3, tasks: 2, val_tasks: 2, test_tasks: 2, engine: loop, device: cpu}
space:
  learner.inner_lr: {float: [0.001, 0.1], log: true}
  net.hidden: {choice: [[4], [8]]}
searcher: random
objective: {name: training, objectives: [loss]}
search: {trials: 3}
run_dir: out
"""
OWN = """
import os

def parabola(trial, centre=3):
    return (trial["x"] - centre) ** 2

def breaks(trial):
    if trial.number > 1:
        raise ValueError("two\\nlines")
    return trial["x"]

def two(trial):
    return trial["x"], -trial["x"] * (1 + trial.number % 2)
"""
PARABOLA = """
space: {x: {int: [1, 9]}}
searcher: grid
objective: {name: "own_search:parabola", args: {centre: 4}}
search: {direction: minimize}
run_dir: out
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with search.yaml, parabola.yaml and the module own_search."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "own_search", raising=False)
    (tmp_path / "search.yaml").write_text(SEARCH)
    (tmp_path / "parabola.yaml").write_text(PARABOLA)
    (tmp_path / "own_search.py").write_text(OWN)
    yield tmp_path
    sys.modules.pop("own_search", None)


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """Leaves out the report, which takes longer than these searches, but in the tests that look at it."""
    if "report" not in request.function.__name__ and "shipped" not in request.function.__name__:
        monkeypatch.setattr("metahpo.report.search.write_search_report", lambda run_dir, study: "nothing")


@pytest.fixture(scope="module")
def finished_search(tmp_path_factory):
    """A finished run of search.yaml, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "search.yaml").write_text(SEARCH)
    assert main(["search", str(folder / "search.yaml"), f"run_dir={folder / 'out'}"]) == 0
    return folder / "out"


@pytest.fixture
def done(here, finished_search):
    """A finished run of search.yaml in the folder ``out`` of the working directory."""
    shutil.copytree(finished_search, here / "out")
    return here / "out"


def refused(capsys, *arguments: str) -> str:
    """The one line that stderr says about bad input."""
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("metahpo: ")
    return err


def trials(run_dir: Path) -> list[tuple]:
    with Study.open(run_dir / "study.db") as study:
        return [(t.number, t.settings, t.state, t.scores, dict(t.reports)) for t in study.trials]


def newest(run_dir: Path) -> str:
    """The name of a run's newest checkpoint, which carries the checksum of its content."""
    return CheckpointStore(run_dir / "checkpoints").list()[-1].name


# Good runs.


def test_a_search_leaves_a_whole_run_directory_with_a_report(here, capsys):
    assert main(["search", "search.yaml"]) == 0
    out, _ = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "Random over 2 settings, 3 trials, 1 worker, run directory out"
    found = trials(here / "out")
    best = min(found, key=lambda trial: trial[3])
    for i, (line, (number, settings, *_, scores, _)) in enumerate(zip(lines[1:4], found), start=1):
        assert line.startswith(f"{i}/3  trial {number}  inner_lr {settings['learner.inner_lr']:.4g}, hidden [")
        assert f"  loss {scores[0]:.5g}  best {min(t[3][0] for t in found[:i]):.5g} (trial " in line
    assert lines[4] == "3 trials: 3 complete, 0 failed"
    assert lines[5].startswith(f"best: trial {best[0]}, loss {best[3][0]:.5g}; inner_lr ")
    assert lines[6:] == [
        "settings: out/best.yaml; train it: metahpo train out/best.yaml",
        "report: out/report/report.md",
    ]
    names = {path.name for path in (here / "out").iterdir()}
    files = {"config.yaml", "versions.json", "fingerprint.json", "study.db", "best.yaml"}
    assert names - {"study.db.lock"} == files | {"study.files", "report"}
    assert not list((here / "out").rglob("*.tmp"))
    config = load_config(here / "out" / "best.yaml")
    assert (config.learner.inner_lr, list(config.net.hidden)) == tuple(best[1].values())
    assert config.run_dir is None
    head = (here / "out" / "best.yaml").read_text().splitlines()
    assert head[0] == f"# Trial {best[0]}, the best of 3 by loss: {best[3][0]!r}."
    assert "gives the same figure exactly" in head[1]


def test_training_the_best_gives_its_figure_exactly(done, capsys):
    number, *_, (score,), _ = min(trials(done), key=lambda trial: trial[3])
    assert main(["train", "out/best.yaml", "run_dir=again"]) == 0
    assert f", loss {score!r}\n" in capsys.readouterr().out
    assert newest(Path("again")) == newest(done / "study.files" / "trials" / f"{number:05d}" / "run")


def test_workers_in_processes_give_the_same_trials_and_a_best_that_can_be_repeated(here, finished_search, capsys):
    # Another engine, whose figures depend on the number of threads.
    settings = ["run.training.engine=vmap", "search.workers=2", "search.trials=4"]
    assert main(["search", "search.yaml", *settings]) == 0
    found = trials(here / "out")
    assert [(t[0], t[1]) for t in found[:3]] == [(t[0], t[1]) for t in trials(finished_search)]
    config = load_config(here / "out" / "best.yaml")
    assert config.training.threads == max(1, len(os.sched_getaffinity(0)) // 2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert main(["train", "out/best.yaml", "run_dir=again"]) == 0
    finally:
        torch.set_num_threads(before)
    number, *_, (score,), _ = min(found, key=lambda trial: trial[3])
    assert f", loss {score!r}\n" in capsys.readouterr().out
    assert newest(Path("again")) == newest(here / "out" / "study.files" / "trials" / f"{number:05d}" / "run")


def test_promoted_trials_are_told_and_go_on_from_checkpoints(here, capsys):
    assert main(["search", "search.yaml", "searcher={name: successive_halving, eta: 3}", "search={budget: 5}"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("SuccessiveHalving over 2 settings, a budget of 5 epochs, 1 worker")
    assert "  budget 1  loss " in out and "  budget 3 after trial " in out
    with Study.open("out/study.db") as study:
        last = study.trials[-1]
    assert last.parent is not None and last.notes["epochs_trained"] == 2
    start = last.notes["resumed_from"]
    assert (start["epoch"], start["iteration"]) == (1, 0)
    assert (here / "out" / "study.files" / "trials" / start["checkpoint"]).exists()


@pytest.mark.parametrize("name", ["random", "hyperband"])
def test_a_shipped_search_runs(here, name):
    small = ["iterations=1", "tasks=1", "val_tasks=2", "test_tasks=2", "engine=loop"]
    arguments = [f"run.training.{setting}" for setting in small] + [
        "run.data.queries=1",
        "space.net.filters={int: [2, 3]}",
    ]
    config = CONFIGS / "glyphs_5way_1shot" / "search" / f"{name}.yaml"
    assert main(["search", str(config), *arguments, "search.workers=1", "search.trials=2", "run_dir=small"]) == 0
    assert (here / "small" / "report" / "report.md").exists()
    assert load_config(here / "small" / "best.yaml").data.source == "glyphs"


def test_the_default_run_directory_is_named_by_the_config_and_new(here):
    (here / "own").mkdir()
    shutil.copy("parabola.yaml", "own")
    for _ in range(2):
        assert main(["search", "own/parabola.yaml", "run_dir=null"]) == 0
    assert len(list((here / "runs" / "own" / "parabola").glob("*/study.db"))) == 2


# An objective of one's own.


def test_ones_own_objective_is_searched(here, capsys):
    assert main(["search", "parabola.yaml"]) == 0
    out = capsys.readouterr().out
    assert "Grid over 1 settings, all of them, 1 worker" in out
    assert "best: trial 3, score 0; x 4\nsettings: out/best.yaml\n" in out
    text = (here / "out" / "best.yaml").read_text()
    assert text.splitlines()[0] == "# Trial 3, the best of 9 by score: 0.0."
    assert yaml.safe_load(text) == {"x": 4}


def test_several_scores_give_a_front(here, capsys):
    arguments = ["objective=own_search:two", "search.direction=[maximize, minimize]"]
    assert main(["search", "parabola.yaml", *arguments]) == 0
    assert "front: " in capsys.readouterr().out
    rows = list(csv.reader((here / "out" / "front.csv").open()))
    assert rows[0] == ["trial", "score 1", "score 2", "x"]
    # Trial n sets n + 1; the score of every second one is twice as good.
    assert [int(row[0]) for row in rows[1:]] == [8, 7]
    assert yaml.safe_load((here / "out" / "best.yaml").read_text()) == {"x": 9}


def test_an_objective_that_raises_stops_the_search_after_so_many_failures(here, capsys):
    arguments = ["objective=own_search:breaks", "search.max_failures=3"]
    assert main(["search", "parabola.yaml", *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("metahpo: stopped after 3 failures in a row; the last, trial 4: ")
    assert len(err.splitlines()) == 1
    assert "trial 4  x 5  failed: " in out
    with Study.open("out/study.db") as study:
        assert [t.state for t in study.trials] == ["complete"] * 2 + ["failed"] * 3
        assert 'raise ValueError("two\\nlines")' in study.trials[-1].error
    # What was found until then is there.
    assert yaml.safe_load((here / "out" / "best.yaml").read_text()) == {"x": 1}
    assert main(["search", "--resume", "out", "search.max_failures=99"]) == 0
    assert "9 trials: 2 complete, 7 failed" in capsys.readouterr().out


# Stopping and going on.

# Trains on after the first trial only when the signal has been sent, however slow the machine.
WAITS = """
import os, signal, sys, time
from metahpo import cli
from metahpo.searchers import trial

signal.signal(signal.SIGINT, signal.default_int_handler)
report = trial.Trial.report

def waiting(self, step, score):
    report(self, step, score)
    if self.number == 1 and step == 1 and "--resume" not in sys.argv:
        print("now", flush=True)
        while not os.path.exists("sent"):
            time.sleep(0.01)

trial.Trial.report = waiting
"""


@pytest.mark.parametrize(("signum", "code", "name"), [(signal.SIGINT, 130, "SIGINT"), (signal.SIGTERM, 143, "SIGTERM")])
def test_a_signal_saves_and_resuming_gives_the_same_trials(here, start, finished_search, signum, code, name, capsys):
    child = start(
        f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
        + WAITS
        + 'sys.exit(cli.main(["search", "search.yaml"]))'
    )
    child.wait_for("now")
    child.send_signal(signum)
    (here / "sent").touch()
    found, _, err = child.finished()
    assert found == code, err
    assert err.splitlines()[-1] == f"metahpo: stopped by {name}"
    run = here / "out" / "study.files" / "trials" / "00001" / "run"
    assert (1, 0) <= position(CheckpointStore(run / "checkpoints").list()[-1]) < (3, 0)
    # The best so far was there already.
    assert "the best of 1 by loss" in (here / "out" / "best.yaml").read_text()
    capsys.readouterr()
    assert main(["search", "--resume", "out"]) == 0
    assert ", 1 ended before, " in capsys.readouterr().out
    assert trials(here / "out") == trials(finished_search)
    for number in range(3):
        runs = [
            folder / "study.files" / "trials" / f"{number:05d}" / "run" for folder in (here / "out", finished_search)
        ]
        assert newest(runs[0]) == newest(runs[1])


def test_resuming_a_finished_search_is_harmless_and_may_go_further(done, capsys):
    before = trials(done)
    assert main(["search", "--resume", "out"]) == 0
    assert trials(done) == before
    (done / "best.yaml").unlink()
    assert main(["search", "--resume", "out", "search.trials=4"]) == 0
    assert "4 trials: 4 complete" in capsys.readouterr().out
    assert trials(done)[:3] == before
    assert (done / "best.yaml").exists()
    assert yaml.safe_load((done / "config.yaml").read_text())["search"]["trials"] == 4


def test_a_best_trial_without_its_files_still_gives_its_config(done):
    shutil.rmtree(done / "study.files")
    assert main(["search", "--resume", "out"]) == 0
    assert (
        load_config(done / "best.yaml").learner.inner_lr == min(trials(done), key=lambda t: t[3])[1]["learner.inner_lr"]
    )


def test_a_best_trial_whose_config_is_damaged_is_said(done, capsys):
    best = yaml.safe_load((done / "best.yaml").read_text())
    for path in done.glob("study.files/trials/*/run/config.yaml"):
        # Cut at a line's end it is a config still.
        path.write_text("".join(path.read_text().partition("training:\n")[:2]) + "  epochs: 3\n")
    capsys.readouterr()
    assert main(["search", "--resume", "out"]) == 0
    assert "config.yaml is damaged: it is not the config of the trial's settings" in capsys.readouterr().err
    kept = yaml.safe_load((done / "best.yaml").read_text())
    for config in (best, kept):
        config["training"].pop("threads")
    assert kept == best


def test_the_report_can_be_written_again(done, capsys):
    shutil.rmtree(done / "report")
    assert main(["report", "out"]) == 0
    assert capsys.readouterr().out == "report: out/report/report.md\n"
    assert (done / "report" / "report.md").is_file()


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["search"], "a CONFIG is needed, or --resume RUN_DIR; see metahpo search --help"),
        (["search", "none.yaml"], "cannot read config none.yaml: No such file or directory"),
        (["search", "--resume", "."], ". is not a run directory: it has no config.yaml"),
        (
            ["search", "--resume", "trained"],
            "trained is not the run of a search; metahpo train or tune --resume goes on",
        ),
        (["search", "search.yaml", "--resume", "out"], "of which only search.trials, "),
        (["search", "--resume", "out", "searcher=tpe"], "may change; found 'searcher=tpe' as well"),
        (["search", "--resume", "out", "search.seed=3"], "may change; found 'search.seed=3' as well"),
        (["search", "search.yaml"], "out already holds a run; --resume it or choose another run_dir"),
        (
            ["search", "search.yaml", "run_dir=new", "space.learner.inner_lr=3"],
            "space.learner.inner_lr: should be {float: [LOW, HIGH]}",
        ),
        (
            ["search", "search.yaml", "run_dir=new", "search.workers=0"],
            "search.workers: should be greater than or equal to 1, found 0",
        ),
        (["train", "--resume", "out"], "out is the run of a search; metahpo search --resume out goes on with it"),
        (["evaluate", "out"], "and metahpo train out/best.yaml trains its best"),
    ],
)
def test_bad_arguments_are_told_in_one_line(done, capsys, arguments, expected):
    (done.parent / "trained").mkdir()
    (done.parent / "trained" / "config.yaml").write_text("data: glyphs\n")
    before = trials(done)
    assert expected in refused(capsys, *arguments)
    assert trials(done) == before


def test_a_study_of_another_search_is_refused(here, done, capsys):
    other = ["search.storage=out/study.db", "run_dir=new"]
    cases = {
        "space.learner.inner_lr={float: [0.01, 0.1]}": "out/study.db is a study of another space: it has ",
        "search.seed=7": "out/study.db is a study with seed 0, asked was 7; use another file",
        "searcher=quasi_random": "out/study.db is a study with searcher Random(), asked was QuasiRandom()",
    }
    for change, expected in cases.items():
        assert expected in refused(capsys, "search", "search.yaml", *other, change)
        shutil.rmtree(here / "new", ignore_errors=True)


def test_a_study_of_a_newer_version_is_refused(done, capsys):
    storage = optuna.storages.RDBStorage(f"sqlite:///{done / 'study.db'}")
    study = storage.get_study_id_from_name("study")
    storage.set_study_user_attr(study, "metahpo", {**storage.get_study_user_attrs(study)["metahpo"], "format": 99})
    assert "study 'study' has format 99, of a newer metahpo" in refused(capsys, "search", "--resume", "out")
    assert "study 'study' has format 99, of a newer metahpo" in refused(capsys, "report", "out")


def test_what_is_no_study_file_is_refused(done, capsys):
    (done / "study.db").write_bytes(b"no database" * 100)
    assert "study.db is not a study file" in refused(capsys, "search", "--resume", "out")


def test_a_second_coordinator_is_refused(done, capsys):
    space = Space({"learner.inner_lr": Float(0.001, 0.1, log=True), "net.hidden": Choice([4], [8])})
    with Study(space, storage=done / "study.db"):
        assert "out/study.db is in use by process " in refused(capsys, "search", "--resume", "out", "search.trials=5")


def test_train_says_its_best_epoch_with_all_digits(here, capsys):
    run = yaml.safe_load(SEARCH)["run"]
    (here / "run.yaml").write_text(yaml.safe_dump({**run, "run_dir": "trained"}))
    assert main(["train", "run.yaml"]) == 0
    _, state, _ = CheckpointStore(here / "trained" / "checkpoints").latest()
    best = min(state["history"], key=lambda row: row["val_loss"])
    assert f"best epoch by validation: {best['epoch']}, loss {best['val_loss']!r}\n" in capsys.readouterr().out


def test_a_refused_command_has_written_nothing(done, capsys):
    from metahpo.searchers.lock import FileLock

    before = (done / "config.yaml").read_bytes()
    with FileLock(done / "study.db.lock", "it"):
        assert "is in use by process" in refused(capsys, "search", "--resume", "out", "search.trials=9")
        assert (done / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    "text, other, key",
    [("epochs: 3", "epochs: 5", "run.training.epochs"), ("fidelity: epochs", "fidelity: tasks", "objective.fidelity")],
)
def test_an_edited_config_is_not_resumed(text, other, key, done, capsys):
    config = done / "config.yaml"
    edited = config.read_text().replace(text, other)
    config.write_text(edited)
    assert f"is a search with {key} " in refused(capsys, "search", "--resume", "out", "search.trials=4")
    assert config.read_text() == edited


def test_an_edited_config_is_not_reported(done, capsys):
    config = done / "config.yaml"
    config.write_text(config.read_text().replace("    log: true\n", ""))
    assert "space.learner.inner_lr: config.yaml says " in refused(capsys, "report", "out")


def test_changed_code_is_said(here, capsys):
    assert main(["search", "parabola.yaml"]) == 0
    (here / "own_search.py").write_text(OWN + "\n# other\n")
    capsys.readouterr()
    assert main(["search", "--resume", "out"]) == 0
    expected = "own_search: the module has changed since the run began: figures may differ\n"
    assert capsys.readouterr().err == expected


def test_another_torch_is_said(done, capsys):
    path = done / "versions.json"
    write_json(path, {**read_json(path), "torch": "1.0"})
    assert main(["search", "--resume", "out"]) == 0
    assert f"begun with torch 1.0, now {torch.__version__}" in capsys.readouterr().err


def test_an_objective_without_a_name_is_the_training(here, capsys):
    assert main(["search", "search.yaml", "objective={fidelity: epochs, objectives: [loss]}", "search.trials=1"]) == 0
    assert "1 trials: 1 complete" in capsys.readouterr().out
