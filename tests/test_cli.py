"""The command line from end to end: what runs leave, what resuming gives back, and what is said to bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from metahpo import __version__
from metahpo.building import build
from metahpo.cli import main
from metahpo.config_file import load_config
from metahpo.errors import NonFiniteError
from metahpo.training import Trainer
from metahpo.training.checkpoint import CheckpointStore, load_checkpoint, position

ROOT = Path(__file__).resolve().parents[1]

GLYPHS = """
data: {source: glyphs, ways: 3, shots: 1, queries: 2}
net: {name: conv4, filters: 4}
learner: {name: maml_pp, steps: 1, inner_lr: 0.1}
training: {epochs: 2, iterations: 2, tasks: 1, val_tasks: 2, test_tasks: 3, engine: loop, device: cpu}
run_dir: out
"""
SINES = """
data: {source: sinusoid, shots: 5, queries: 5, eval_queries: 5}
net: {name: mlp, hidden: [8]}
learner: {name: maml, steps: 1, inner_lr: 0.01}
training: {epochs: 3, iterations: 3, tasks: 2, val_tasks: 2, test_tasks: 2, engine: loop, device: cpu}
run_dir: out
"""

# A user's own module: nets, learners and task sources, good and bad.
OWN = """
import sys

import torch
from torch import nn

from metahpo.learners import MAML, Adapted, MetaLearner
from metahpo.tasks import Sinusoid, Task


def build(in_shape, out_features, width=6):
    size = torch.Size(in_shape).numel()
    return nn.Sequential(nn.Flatten(), nn.Linear(size, width), nn.Tanh(), nn.Linear(width, out_features))


def raises():
    raise ValueError("two\\nlines")


def exits():
    sys.exit(3)


def three():
    return 3


def seven_outputs():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 7))


def other_inputs():
    return nn.Linear(5, 3)


class SupportOnly(nn.Module):
    # Takes as many examples as the support set has, and no other number.
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(784, 3)

    def forward(self, x):
        return self.linear(x.reshape(3, 784))


def frozen(in_shape, out_features):
    return build(in_shape, out_features).requires_grad_(False)


class Shifted(MAML):
    def __init__(self, net, loss, shift=0.0):
        super().__init__(net, steps=1, inner_lr=0.01, loss=loss)
        self.shift = shift

    def predict(self, adapted, x):
        return super().predict(adapted, x) + self.shift


class Unfinished(MetaLearner):
    def __init__(self, net):
        super().__init__()
        self.net = net


class Constant(MetaLearner):
    def __init__(self, net, loss):
        super().__init__(loss)

    def adapt(self, support_x, support_y, phase):
        return Adapted({}, phase)

    def predict(self, adapted, x):
        return x


def lines(split, seed, slope=1.0):
    class Lines(Sinusoid):
        def batch(self, indices):
            task = super().batch(indices)
            return Task(task.support_x, slope * task.support_x, task.query_x, slope * task.query_x)

    return Lines(split, shots=4, queries=4, seed=seed)


def ends(split, seed):
    class Ends(Sinusoid):
        def batch(self, indices):
            if split == "val" and max(indices) >= 1:
                raise IndexError("only 1 task")
            return super().batch(indices)

    return Ends(split)


def flat(split, seed):
    class Flat(Sinusoid):
        def batch(self, indices):
            task = super().batch(indices)
            return task._replace(support_y=task.support_y[..., 0])

    return Flat(split)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with glyphs.yaml, sines.yaml and the module own_code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "own_code", raising=False)
    (tmp_path / "glyphs.yaml").write_text(GLYPHS)
    (tmp_path / "sines.yaml").write_text(SINES)
    (tmp_path / "own_code.py").write_text(OWN)
    yield tmp_path
    sys.modules.pop("own_code", None)


@pytest.fixture(scope="module")
def finished_sines(tmp_path_factory):
    """A finished run of sines.yaml, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "sines.yaml").write_text(SINES)
    assert main(["train", str(folder / "sines.yaml"), f"run_dir={folder / 'out'}"]) == 0
    return folder / "out"


@pytest.fixture
def run(here, finished_sines):
    """A finished run of sines.yaml in the folder ``out`` of the working directory."""
    shutil.copytree(finished_sines, here / "out")
    return here / "out"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refused(capsys, *arguments: str, lines: int = 1) -> str:
    """What stderr says about bad input; checks the exit code, and that nothing was printed or left on disk."""
    before = files(Path.cwd())
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == lines, err
    assert all(line.startswith("metahpo: ") for line in err.splitlines())
    assert "Traceback" not in err
    assert files(Path.cwd()) == before
    return err


def final(run_dir: Path) -> str:
    """The name of the newest checkpoint, which carries the checksum of its content."""
    return CheckpointStore(run_dir / "checkpoints").list()[-1].name


# Good runs.


def test_training_leaves_a_whole_run_directory(here, capsys):
    assert main(["train", "glyphs.yaml", "training.keep_best=2"]) == 0
    out, err = capsys.readouterr()
    run_dir = here / "out"
    assert {"config.yaml", "versions.json", "metrics.csv", "checkpoints", "test.json", "report"} <= files(run_dir)
    assert (run_dir / "report" / "report.md").is_file()
    assert [position(p) for p in CheckpointStore(run_dir / "checkpoints").list()] == [(1, 0), (2, 0)]
    test = json.loads((run_dir / "test.json").read_text())
    assert (test["split"], test["tasks"], list(test["rows"])) == ("test", 3, ["best", "ensemble of 2"])
    assert len((run_dir / "metrics.csv").read_text().splitlines()) == 3
    assert "epoch 1/2" in out and "epoch 2/2" in out and "3 test tasks" in out and "report.md" in out
    assert "Traceback" not in err and not list(run_dir.rglob("*.tmp"))

    assert main(["evaluate", "out", "--split", "val", "--tasks", "2"]) == 0
    assert "2 val tasks" in capsys.readouterr().out
    assert json.loads((run_dir / "val.json").read_text())["tasks"] == 2

    shutil.rmtree(run_dir / "report")
    assert main(["report", "out"]) == 0
    assert (run_dir / "report" / "report.md").is_file()


def test_the_default_run_directory_is_new_each_time(here, capsys):
    short = ["training.epochs=1", "training.iterations=1", "run_dir=null"]
    assert main(["train", "sines.yaml", *short]) == 0
    assert main(["train", "sines.yaml", *short]) == 0
    assert len(list((here / "runs").glob("*/*/config.yaml"))) == 2


def test_stopping_at_an_epoch_and_going_on_ends_in_the_same_checkpoint(here, finished_sines, capsys):
    # Overrides may follow an option.
    assert main(["train", "sines.yaml", "--until-epoch", "1", "run_dir=parts"]) == 0
    assert final(here / "parts").startswith("epoch-0001.")
    assert main(["train", "--resume", "parts", "--until-epoch", "2"]) == 0
    assert main(["train", "--resume", "parts"]) == 0
    assert "resuming parts at epoch 3, iteration 1" in capsys.readouterr().out
    assert final(here / "parts") == final(finished_sines)


def test_resuming_a_finished_run_is_harmless(run, capsys):
    before = {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    for _ in range(2):
        assert main(["train", "--resume", "out"]) == 0
    assert "out is trained: all 3 epochs are done" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()} == before


# Trains on after its first epoch only when the signal has been sent, however slow the machine.
WAITS = """
import os, time
from metahpo import cli

def show(*text, **how):
    print(*text, **how)
    while "epoch 1/6" in text[0] and not os.path.exists("sent"):
        time.sleep(0.01)

cli.print = show
"""


@pytest.mark.parametrize(("signum", "code", "name"), [(signal.SIGINT, 130, "SIGINT"), (signal.SIGTERM, 143, "SIGTERM")])
def test_a_signal_saves_and_resuming_ends_in_the_same_checkpoint(here, start, monkeypatch, signum, code, name):
    overrides = ["training.epochs=6", "training.iterations=10", "training.min_lr=null"]
    arguments = ["train", "sines.yaml", *overrides, "run_dir=stopped"]
    # As many threads on both sides, so that sums are added in the same order.
    child = start(
        f"import signal, sys, torch; torch.set_num_threads({torch.get_num_threads()})\n"
        # A shell's background job, and so these tests in one, is started with Ctrl-C ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n" + WAITS + f"sys.exit(cli.main({arguments}))"
    )
    child.wait_for("epoch 1/6")
    child.send_signal(signum)
    (here / "sent").touch()
    found, _, err = child.finished()
    assert found == code
    assert err.splitlines()[-2:] == [
        "stopping after this step; once more stops at once, without saving",
        f"metahpo: stopped by {name}",
    ]
    assert position(CheckpointStore(here / "stopped" / "checkpoints").list()[-1]) < (6, 0)
    monkeypatch.setattr("metahpo.cli._write_report", lambda *_: None)
    assert main(["train", "--resume", "stopped"]) == 0
    assert main(["train", "sines.yaml", *overrides, "run_dir=whole"]) == 0
    assert final(here / "stopped") == final(here / "whole")
    assert final(here / "whole").startswith("epoch-0006.")


@pytest.mark.parametrize("made_of_it", ["raise", "raise ImportError('interrupted')", "pass"])
def test_ctrl_c_while_a_module_is_imported_ends_in_one_line(here, start, made_of_it):
    (here / "slow.py").write_text(
        "import os, signal, time\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
        f"except KeyboardInterrupt:\n    {made_of_it}\n"
    )
    child = start(
        "import signal, sys\n"
        "from metahpo.__main__ import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.argv = ['metahpo', 'train', 'sines.yaml', 'net=slow:build', 'run_dir=never']\n"
        "sys.exit(main())"
    )
    code, _, err = child.finished()
    assert (code, err) == (130, "metahpo: stopped by SIGINT\n")


def test_ctrl_c_that_a_library_makes_another_error_of_is_told_all_the_same(here, start):
    child = start(
        "import os, signal, sys\n"
        "from metahpo import cli\n"
        "from metahpo.__main__ import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def interrupted():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    except KeyboardInterrupt as error:\n"
        "        raise ValueError(f'while serialising: {error!r}')\n"
        "cli.main = interrupted\n"
        "sys.exit(main())"
    )
    code, _, err = child.finished()
    assert (code, err) == (130, "metahpo: stopped by SIGINT\n")


def test_a_damaged_checkpoint_is_passed_over_and_said(run, finished_sines, capsys):
    newest = CheckpointStore(run / "checkpoints").list()[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    assert main(["train", "--resume", "out"]) == 0
    out, err = capsys.readouterr()
    assert f"{newest.name} is damaged" in err and "going on from epoch-0002." in err
    assert "resuming out at epoch 3, iteration 1" in out
    assert final(run) == final(finished_sines)


def test_own_net_learner_and_tasks_are_found_in_the_working_directory(here, capsys):
    overrides = [
        "net={name: 'own_code:build', args: {width: 5}}",
        "learner={name: 'own_code:Shifted', args: {shift: 0.5}}",
        "data={source: 'own_code:lines', args: {slope: 3.0}}",
    ]
    assert main(["train", "sines.yaml", *overrides]) == 0
    _, state, _ = CheckpointStore(here / "out" / "checkpoints").latest()
    assert [tuple(value.shape) for value in state["learner"].values()][:2] == [(5, 1), (5,)]
    assert main(["train", "--resume", "out"]) == 0
    assert main(["evaluate", "out"]) == 0


def test_version_and_help(capsys):
    for arguments, text in ((["--version"], __version__), (["train", "--help"], "--until-epoch")):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert text in capsys.readouterr().out


# Divergence.


def test_divergence_is_told_with_its_place_and_nothing_is_updated(here, capsys):
    # The first epoch goes well: its tasks are sines of the module own_code; those of the second are not finite.
    (here / "own_code.py").write_text(
        OWN
        + """

def breaks(split, seed):
    class Breaks(Sinusoid):
        def batch(self, indices):
            task = super().batch(indices)
            scale = [1e30 if split == "train" and i == 7 else 1.0 for i in indices]
            return task._replace(query_y=task.query_y * torch.tensor(scale)[:, None, None])

    return Breaks(split, shots=5, queries=5)
"""
    )
    arguments = ["train", "sines.yaml", "data=own_code:breaks", "training.iterations=2"]
    assert main(arguments) == 1
    _, err = capsys.readouterr()
    assert err.startswith("metahpo: epoch 2, iteration 2: the loss of task 7 is not finite (parameters are as before")
    newest = CheckpointStore(here / "out" / "checkpoints").list()[-1]
    assert position(newest) == (1, 0)
    assert err.rstrip().endswith(f"the last good checkpoint is {Path('out/checkpoints') / newest.name}")
    assert len(err.splitlines()) == 1
    assert all(torch.isfinite(value).all() for value in load_checkpoint(newest)["learner"].values())


def test_a_rate_too_high_diverges_with_exit_code_1(here, capsys):
    assert main(["train", "glyphs.yaml", "learner.inner_lr=1e30"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("metahpo: epoch 1, iteration 1: the loss of task 0 is not finite")
    assert len(err.splitlines()) == 1


def test_divergence_leaves_the_parameters_as_they_were(here):
    config = load_config("glyphs.yaml", ["learner.inner_lr=1e30"])
    tasks, learner = build(config)
    trainer = Trainer(learner, tasks["train"], tasks["val"], config.training, here / "out")
    before = {name: p.detach().clone() for name, p in trainer.learner.outer_params().items()}
    with pytest.raises(NonFiniteError):
        trainer.fit()
    assert all(torch.equal(p, before[name]) for name, p in trainer.learner.outer_params().items())


# Bad input: configs and arguments. tests/test_config.py has every kind of wrong setting.


def test_every_wrong_setting_is_told_at_once(here, capsys):
    err = refused(capsys, "train", "glyphs.yaml", "training.lr=-1", "net.fliters=3", "dta=1", lines=3)
    assert "glyphs.yaml: training.lr: should be greater than 0, found -1" in err
    assert "unknown key 'net.fliters'; did you mean 'filters'?" in err
    assert "unknown key 'dta'; did you mean 'data'?" in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "none.yaml"], "cannot read config none.yaml: No such file or directory"),
        (["train", "."], "cannot read config .: Is a directory"),
        (["train"], "a CONFIG is needed, or --resume RUN_DIR; see metahpo train --help"),
        (["train", "sines.yaml", "--resume", "out"], "only training.epochs may change; found 'sines.yaml' as well"),
        (["train", "--resume", "out", "--until-epoch", "1", "training.lr=1"], "found 'training.lr=1' as well"),
        (["train", "--resume", "."], ". is not a run directory: it has no config.yaml"),
        (["evaluate", "none"], "none is not a run directory"),
        (["report", "sines.yaml"], "sines.yaml is not a run directory"),
        (["evaluate", "out", "--tasks", "0"], "argument --tasks: should be a whole number of at least 2, found '0'"),
        (["evaluate", "out", "--tasks", "x"], "argument --tasks: should be a whole number of at least 2, found 'x'"),
        (["train", "sines.yaml", "--until-epoch", "1.5"], "argument --until-epoch: should be a whole number"),
        (["train", "sines.yaml", "--epochs", "3"], "unrecognized arguments: --epochs"),
        (["evaluate", "out", "--split", "tset"], "argument --split: invalid choice: 'tset'"),
        (["tarin"], "argument COMMAND: invalid choice: 'tarin'"),
        ([], "the following arguments are required: COMMAND; see metahpo --help"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(here, capsys, arguments, expected):
    assert expected in refused(capsys, *arguments)


# Bad input: settings that only the objects themselves can judge.


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "training.optimizer_args={momentum: 0.9}",
            "training.optimizer_args: Adam has no argument 'momentum'; known: bet",
        ),
        ("training.optimizer_args={betaz: 3}", "Adam has no argument 'betaz'; did you mean 'betas'?"),
        ("training.optimizer_args={betas: 3}", "training.optimizer_args: Adam refuses {'betas': 3}: TypeError"),
        (
            "training.optimizer_args={lr: 0.1}",
            "training.optimizer_args.lr: should not be here; the rate is training.lr",
        ),
        ("training.optimizer=SparseAdam", "training.optimizer: SparseAdam cannot train this learner: RuntimeError"),
        ("training.optimizer=LBFGS", "training.optimizer: LBFGS cannot train this learner: TypeError"),
        ("training.device=meta", "training.device: should be auto, cpu or cuda, found 'meta'"),
        ("data.ways=1000", "split 'train' has 888 classes, fewer than the 1000 ways of a task"),
        ("data.shots=30", "class 'LATIN/0041' of split 'train' has 20 images; a task needs 32 (30 shots + 2 queries)"),
        ("data=sinusoid", "net conv4 takes images [C, H, W]; the data gives [1]; choose mlp"),
        ("net.filters=99999999999", "net conv4 of this size cannot be made: RuntimeError"),
        ("run_dir=glyphs.yaml", "run_dir glyphs.yaml: glyphs.yaml is a file, expected a folder"),
        ("run_dir=glyphs.yaml/x/y", "run_dir glyphs.yaml/x/y: glyphs.yaml is a file, expected a folder"),
        ("run_dir=/proc/none", "/proc/none"),
        ("data={source: folder, root: none}", "none: no such folder; expected root/{train,val,test}/CLASS"),
        ("data={source: omniglot, root: none}", "none: no such folder, expected both archives of Omniglot"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(here, capsys, override, expected):
    assert expected in refused(capsys, "train", "glyphs.yaml", override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("net=none:f", "net.name: cannot import 'none': ModuleNotFoundError: No module named 'none'"),
        ("net=syntax:f", "net.name: cannot import 'syntax': SyntaxError: "),
        ("net=own_code:none", "own_code.py) has no function or class 'none'"),
        ("net=own_code:raises", "net.name: own_code:raises failed: ValueError: two lines ("),
        ("net=own_code:exits", "net.name: own_code:exits failed: SystemExit: 3 ("),
        ("net=own_code:three", "net.name: own_code:three gave int, expected a torch.nn.Module"),
        ("net={name: 'own_code:build', args: {name: 1}}", "own_code:build cannot be called as build("),
        (
            "net=own_code:seven_outputs",
            "net own_code:seven_outputs gives [3, 7] for inputs [3, 1, 28, 28]; expected [3, 3] (3 ways)",
        ),
        ("net=own_code:other_inputs", "net own_code:other_inputs fails on inputs [3, 1, 28, 28]: RuntimeError"),
        ("net=own_code:SupportOnly", "net own_code:SupportOnly fails on inputs [6, 1, 28, 28]: RuntimeError: shape"),
        ("net=own_code:frozen", "no parameter to adapt"),
        ("learner=own_code:three", "learner.name: own_code:three cannot be called as three(Conv4)"),
        (
            "learner=own_code:Unfinished",
            "learner.name: own_code:Unfinished fails on a task: TypeError: Unfinished does",
        ),
        ("data=own_code:three", "data.source: own_code:three cannot be called as three(split=, seed=)"),
        ("data={source: 'own_code:lines', args: {split: x}}", "data.args.split: metahpo itself passes split"),
        ("data={source: 'own_code:lines', args: {slope: x}}", "split 'train': task 0 of 4 fails: "),
        ("data=own_code:ends", "data.source own_code:ends, split 'val': task 1 of 2 fails: IndexError: only 1 task ("),
        ("data=own_code:flat", "split 'train': task 0: support_y is [10]; expected values [N, D], or labels as int64"),
    ],
)
def test_own_code_that_cannot_serve_is_refused_with_its_place(here, capsys, override, expected):
    (here / "syntax.py").write_text("def f(:\n")
    err = refused(capsys, "train", "glyphs.yaml", override)
    assert expected in err
    if "failed: ValueError" in err:
        assert f"(own_code.py:{OWN.splitlines().index('def raises():') + 2}" in err


def test_a_learner_with_nothing_to_learn_is_refused(here, capsys):
    err = refused(capsys, "train", "sines.yaml", "learner=own_code:Constant")
    assert "learner.name: Constant has no parameter to learn" in err


def images(root: Path, classes: dict[str, int], each: int) -> None:
    for split, count in classes.items():
        for number in range(count):
            folder = root / split / f"class{number}"
            folder.mkdir(parents=True)
            for index in range(each):
                Image.fromarray(np.full((6, 6), 40 * number + index, np.uint8)).save(folder / f"{index}.png")


def test_image_folders_that_are_too_small_or_damaged_are_named(here, capsys):
    arguments = [
        "train",
        "glyphs.yaml",
        "data={source: folder, root: pictures, size: 6, channels: 1, ways: 3, queries: 2}",
    ]
    # Only the test split is too small: told before the training all the same.
    images(here / "pictures", {"train": 3, "val": 3, "test": 2}, 3)
    assert "split 'test' has 2 classes, fewer than the 3 ways of a task" in refused(capsys, *arguments)
    images(here / "pictures", {"test/more": 1}, 3)
    shutil.move(here / "pictures" / "test" / "more" / "class0", here / "pictures" / "test" / "class2")
    shutil.rmtree(here / "pictures" / "test" / "more")
    (here / "pictures" / "val" / "class1" / "2.png").unlink()
    expected = "class 'val/class1' of split 'val' has 2 images; a task needs 3 (1 shots + 2 queries)"
    assert expected in refused(capsys, *arguments)
    (here / "pictures" / "val" / "class1" / "2.png").write_bytes(b"no picture")
    assert "pictures/val/class1/2.png: cannot be decoded" in refused(capsys, *arguments)
    shutil.copy(here / "pictures" / "val" / "class1" / "1.png", here / "pictures" / "val" / "class1" / "2.png")
    assert main([*arguments, "training.epochs=1", "training.iterations=1"]) == 0


def test_a_corrupt_archive_is_named(here, capsys):
    (here / "omniglot").mkdir()
    (here / "omniglot" / "images_background.zip").write_bytes(b"PK\3\4 and no more")
    with zipfile.ZipFile(here / "omniglot" / "images_evaluation.zip", "w"):
        pass
    err = refused(capsys, "train", "glyphs.yaml", "data={source: omniglot, root: omniglot}")
    assert "omniglot/images_background.zip: cannot be read as a zip" in err


# Bad input: run directories.


def test_a_run_directory_in_use_is_left_alone(run, capsys):
    err = refused(capsys, "train", "sines.yaml")
    assert "out already holds a run; --resume it or choose another run_dir" in err


def test_a_run_stopped_in_its_first_epoch_can_be_resumed_but_not_tested(run, capsys):
    # The state after two iterations, as a signal would have left it.
    store = CheckpointStore(run / "checkpoints")
    _, state, _ = store.latest()
    shutil.rmtree(run / "checkpoints")
    store.save({**state, "epoch": 0, "iteration": 2, "history": []}, 0, 2)
    for command in ("evaluate", "report"):
        assert "out has no whole epoch yet" in refused(capsys, command, "out")


def test_a_checkpoint_that_no_longer_fits_is_refused(run, capsys):
    config = (run / "config.yaml").read_text()
    assert "- 8\n" in config
    (run / "config.yaml").write_text(config.replace("- 8\n", "- 9\n"))
    err = refused(capsys, "train", "--resume", "out")
    assert "does not fit the learner: 'module.net.layers.1.weight' is (8, 1), expected (9, 1)" in err


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_an_edited_config_is_neither_tested_nor_reported(run, capsys, command):
    config = (run / "config.yaml").read_text()
    assert "\n  seed: 0\n" in config
    (run / "config.yaml").write_text(config.replace("\n  seed: 0\n", "\n  seed: 1\n"))
    assert "seed: config.yaml says 1, but the run began with 0" in refused(capsys, command, "out")


def test_resuming_with_other_settings_is_refused(run, capsys):
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("keep_best: 5\n", "keep_best: 4\n").replace("lr: 0.001", "lr: 0.1"))
    err = refused(capsys, "train", "--resume", "out", lines=2)
    assert f"training.keep_best: config.yaml says 4, but {final(run)} was trained with 5" in err
    assert "training.lr: config.yaml says 0.1" in err


def test_a_run_whose_config_is_broken_is_refused(run, capsys):
    (run / "config.yaml").write_text("data: [")
    for arguments in (["train", "--resume", "out"], ["evaluate", "out"], ["report", "out"]):
        assert "config out/config.yaml is not YAML" in refused(capsys, *arguments)


def test_a_run_with_only_damaged_checkpoints_is_refused(run, capsys):
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(b"\0" + path.read_bytes())
    for arguments in (["train", "--resume", "out"], ["evaluate", "out"], ["report", "out"]):
        err = refused(capsys, *arguments)
        assert "no whole checkpoint in out/checkpoints" in err and final(run) in err


def test_a_checkpoint_with_code_is_refused(run, capsys):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, ("marker",)

    store = CheckpointStore(run / "checkpoints")
    _, state, _ = store.latest()
    newest = store.save({**state, "extra": Malicious()}, 3)
    for arguments in (["train", "--resume", "out"], ["evaluate", "out"], ["report", "out"]):
        err = refused(capsys, *arguments)
        assert f"{newest.name} holds code or objects other than tensors and plain values; refused" in err


def test_a_program_that_is_called_wrongly_exits_with_2(here, start):
    program = "import runpy, sys\nsys.argv = ['', 'train', 'none.yaml']\n"
    code, out, err = start(program + "runpy.run_module('metahpo', run_name='__main__')").finished()
    assert (code, out) == (2, "")
    assert err == "metahpo: cannot read config none.yaml: No such file or directory\n"


@pytest.mark.parametrize("config", ["glyphs_5way_1shot/quick", "glyphs_20way_1shot/quick", "sinusoid_10shot/maml"])
def test_the_small_configs_run(here, config):
    small = "training.epochs=1 training.iterations=1 training.tasks=2 training.val_tasks=2 training.test_tasks=2"
    # Not auto, which tries the others first.
    small += " training.engine=loop"
    assert main(["train", str(ROOT / "configs" / f"{config}.yaml"), *small.split(), "run_dir=small"]) == 0
    assert (here / "small" / "report" / "report.md").exists()


def test_keys_lists_every_key_of_the_configs(capsys):
    assert main(["train", "--keys"]) == 0
    listed = set(re.findall(r"^  ([\w.]+)", capsys.readouterr().out, re.MULTILINE))
    for path in (path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name not in ("digits", "search")):
        tree = yaml.safe_load(path.read_text())
        keys = {f"{section}.{key}" for section, values in tree.items() for key in values}
        assert keys - {"data.source", "net.name", "learner.name"} <= listed, path


def test_a_net_that_checkpoints_is_refused_before_any_work(here, capsys):
    (here / "deep.py").write_text(
        "from torch import nn\n"
        "from torch.utils.checkpoint import checkpoint\n"
        "class Deep(nn.Module):\n"
        "    def __init__(self, out_features):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Sequential(nn.Flatten(), nn.Linear(784, out_features))\n"
        "    def forward(self, x):\n"
        "        return checkpoint(self.layer, x, use_reentrant=False)\n"
    )
    err = refused(capsys, "train", "glyphs.yaml", "net=deep:Deep")
    assert "Deep checkpoints activations inside" in err
    assert not (here / "out").exists()
