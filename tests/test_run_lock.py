"""Run directories: one process at a time, nothing begun over a log, figures kept."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from pathlib import Path

import pytest

from metahpo.cli import main
from metahpo.errors import CheckpointError
from metahpo.runs.fingerprint import write_fingerprint
from metahpo.runs.lock import RUN_LOCK, FileLock, holding_run
from metahpo.training.settings import TrainingSettings

SINES = """
data: {source: sinusoid, shots: 5, queries: 5, eval_queries: 5}
net: {name: mlp, hidden: [8]}
learner: {name: maml, steps: 1, inner_lr: 0.01}
training: {epochs: 3, iterations: 2, tasks: 2, val_tasks: 2, test_tasks: 2, engine: loop, device: cpu}
run_dir: out
"""
TUNE = """
data: {source: digits, train: 60, val: 30, test: 30}
net: {name: mlp, hidden: [4]}
device: cpu
tune: {steps: 3, phases: 1, iterations: 2}
run_dir: tuned
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    for name, text in (("sines", SINES), ("rates", TUNE)):
        (folder / f"{name}.yaml").write_text(text)
    assert main(["train", str(folder / "sines.yaml"), f"run_dir={folder / 'out'}"]) == 0
    assert main(["tune", "rates", str(folder / "rates.yaml"), f"run_dir={folder / 'tuned'}"]) == 0
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--resume", "out"],
        ["train", "sines.yaml", "run_dir=fresh"],
        ["evaluate", "out"],
        ["report", "out"],
        ["tune", "rates", "--resume", "tuned"],
        ["tune", "rates", "rates.yaml", "run_dir=fresh"],
    ],
)
def test_a_run_directory_that_another_process_holds_is_left_as_it_is(here, capsys, command):
    folder = here / {"out": "out", "tuned": "tuned"}.get(command[-1], "fresh")
    # As another process has it: not through the registry of this one.
    with FileLock(folder / RUN_LOCK, "it"):
        before = content(here)
        capsys.readouterr()
        assert main(command) == 2
        assert content(here) == before
    err = capsys.readouterr().err
    assert f"metahpo: run directory {folder.name} is in use by process " in err
    assert err.count("\n") == 1
    assert not (folder / RUN_LOCK).exists()


def test_the_lock_that_a_dead_process_left_is_no_obstacle(here):
    (here / "out" / RUN_LOCK).write_text("process 1 on elsewhere")
    assert main(["evaluate", "out", "--tasks", "3"]) == 0
    assert not (here / "out" / RUN_LOCK).exists()


def test_one_thread_may_hold_a_run_directory_twice_and_another_may_not(tmp_path):
    raised = []

    def other():
        try:
            with holding_run(tmp_path):
                pass
        except CheckpointError as error:
            raised.append(str(error))

    with holding_run(tmp_path):
        with holding_run(tmp_path / "." / ".." / tmp_path.name):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert (tmp_path / RUN_LOCK).exists()
    assert "is in use by another thread" in raised[0]
    with holding_run(tmp_path):
        pass


@pytest.mark.parametrize(("command", "folder"), [(["train"], "out"), (["tune", "rates"], "tuned")])
def test_a_log_without_checkpoints_is_not_written_over(here, capsys, command, folder):
    shutil.rmtree(here / folder / "checkpoints")
    before = content(here)
    capsys.readouterr()
    assert main([*command, "--resume", folder]) == 2
    err = capsys.readouterr().err
    assert f"{folder} has metrics.csv and no checkpoint to go on from" in err and err.count("\n") == 1
    assert content(here) == before


@pytest.mark.parametrize(("command", "folder"), [(["train"], "out"), (["tune", "rates"], "tuned")])
def test_a_run_killed_before_its_first_checkpoint_begins_again(here, command, folder):
    for path in ("checkpoints", "report"):
        shutil.rmtree(here / folder / path)
    for name in ("metrics.csv", "test.json", "result.pt"):
        (here / folder / name).unlink(missing_ok=True)
    assert main([*command, "--resume", folder]) == 0
    assert any((here / folder / "checkpoints").glob("*.pt"))


@pytest.mark.parametrize(
    ("damage", "command"),
    [
        ("truncated", ["report", "out"]),
        ("empty", ["report", "out"]),
        ("deleted", ["report", "out"]),
        ("bytes", ["report", "out"]),
        ("digit", ["train", "--resume", "out"]),
        ("digit", ["tune", "rates", "--resume", "tuned"]),
    ],
)
def test_a_damaged_log_is_written_again_from_the_checkpoint_and_said(here, capsys, command, damage):
    log = here / command[-1] / "metrics.csv"
    whole = log.read_bytes()
    lines = whole.splitlines(keepends=True)
    other = lines[0] + lines[1].replace(b",0.", b",7.", 1) + b"".join(lines[2:])
    broken = {"digit": other, "truncated": whole[: len(lines[0]) + 5], "empty": b"", "bytes": b"\xff" + whole[1:]}
    log.unlink() if damage == "deleted" else log.write_bytes(broken[damage])
    capsys.readouterr()
    assert main(command) == 0
    err = capsys.readouterr().err
    assert "metrics.csv" in err and "written again from the checkpoint" in err and err.count("\n") == 1
    without = lambda text: [line.rpartition(b",")[0] for line in text.splitlines()]  # noqa: E731
    assert without(log.read_bytes()) == without(whole)


@pytest.mark.parametrize(
    ("old", "new", "command", "expected"),
    [
        ("inner_lr: 0.01", "inner_lr: 0.02", ["train", "--resume", "out"], "learner.inner_lr: config.yaml says 0.02"),
        ("queries: 5", "queries: 4", ["train", "--resume", "out"], "data.queries: config.yaml says 4"),
        ("train: 60", "train: 61", ["tune", "rates", "--resume", "tuned"], "data.train: config.yaml says 61"),
    ],
)
def test_an_edited_config_is_not_resumed(here, capsys, old, new, command, expected):
    config = here / command[-1] / "config.yaml"
    config.write_text(config.read_text().replace(old, new, 1))
    capsys.readouterr()
    assert main(command) == 2
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1


def test_other_figures_are_never_written_over_by_evaluate(here):
    first = (here / "out" / "test.json").read_bytes()
    assert main(["evaluate", "out", "--tasks", "3"]) == 0
    assert (here / "out" / "test.json").read_bytes() == first
    assert b'"tasks": 3' in (here / "out" / "test-3.json").read_bytes()


def test_an_old_run_and_another_number_of_threads_resume_with_a_word(here, capsys):
    path = here / "out" / "fingerprint.json"
    kept = json.loads(path.read_text())
    kept.pop("checksum")
    kept["versions"]["threads"] = "99"
    write_fingerprint(here / "out", kept)
    capsys.readouterr()
    assert main(["train", "--resume", "out"]) == 0
    assert "begun with threads 99, now" in capsys.readouterr().err
    path.unlink()
    assert main(["train", "--resume", "out"]) == 0
    assert "fingerprint.json is not there" in capsys.readouterr().err


def test_a_longer_training_is_the_one_that_was_begun_so(here, monkeypatch, capsys):
    monkeypatch.setattr("metahpo.report.write_report", lambda run_dir, learner, task: run_dir)
    assert main(["train", "sines.yaml", "run_dir=short", "training.epochs=1", "training.keep_best=3"]) == 0
    assert main(["train", "--resume", "short", "training.epochs=3"]) == 0
    assert main(["train", "sines.yaml", "run_dir=long", "training.keep_best=3"]) == 0
    last = [sorted((here / name / "checkpoints").glob("*.pt"))[-1].name for name in ("short", "long")]
    assert last[0] == last[1], "the name carries the content's checksum"
    assert "epochs: 3\n" in (here / "short" / "config.yaml").read_text()
    capsys.readouterr()
    assert main(["train", "--resume", "short", "training.epochs=2"]) == 2
    assert "training.epochs: config.yaml says 2, but 3 are done" in capsys.readouterr().err
    assert main(["train", "--resume", "short", "training.lr=2"]) == 2
    assert "of which only training.epochs may change; found 'training.lr=2'" in capsys.readouterr().err
    assert "epochs: 3\n" in (here / "short" / "config.yaml").read_text()


def test_a_training_whose_rate_is_annealed_is_not_made_longer(here, capsys):
    assert main(["train", "sines.yaml", "run_dir=annealed", "training.min_lr=0.0001", "--until-epoch", "1"]) == 0
    capsys.readouterr()
    for change in (["training.epochs=4"], []):
        if not change:
            config = here / "annealed" / "config.yaml"
            config.write_text(config.read_text().replace("epochs: 3", "epochs: 4"))
        assert main(["train", "--resume", "annealed", *change]) == 2
        err = capsys.readouterr().err
        assert "trained with 3 (training.min_lr anneals the rate over all epochs); set it back" in err
        assert err.count("\n") == 1


def test_an_optimizer_may_be_written_in_any_case():
    names = {TrainingSettings(optimizer=name).optimizer for name in ("adamw", "AdamW", "ADAMW", "torch.optim.AdamW")}
    assert names == {"AdamW"}
