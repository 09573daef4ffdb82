from __future__ import annotations

import json
import signal
import textwrap
from pathlib import Path

import pytest
import torch

from metahpo.cli import main
from metahpo.training.checkpoint import CheckpointStore, position
from metahpo.training.distributed import Ranks

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

SINES = """
data: {source: sinusoid, shots: 5, queries: 5, eval_queries: 5}
net: {name: mlp, hidden: [8]}
learner: {name: maml, steps: 1, inner_lr: 0.01}
training: {epochs: 2, iterations: 10, tasks: 4, val_tasks: 9, test_tasks: 7, keep_best: 2, engine: loop, device: cpu}
"""
# SGD: under Adam the biases before a batch norm, whose gradients are rounding alone, walk at random.
GLYPHS = """
data: {source: glyphs, ways: 3, shots: 1, queries: 2}
net: {name: conv4, filters: 4}
learner: {name: maml_pp, steps: 2, inner_lr: 0.1}
training:
  {epochs: 2, iterations: 3, tasks: 4, val_tasks: 5, test_tasks: 5, engine: vmap, device: cpu, optimizer: SGD, lr: 0.02}
"""
OWN = """
import os, signal
import torch
from metahpo.tasks import Sinusoid

RANK = int(os.environ.get("RANK", 0))


class Own(Sinusoid):
    def batch(self, indices):
        task = super().batch(indices)
        if self.split == "train":
            task = self.changed(task, indices)
        return task


class Nan(Own):
    def changed(self, task, indices):
        factors = torch.tensor([float("nan") if i == 27 else 1.0 for i in indices])
        return task._replace(query_y=task.query_y * factors[:, None, None])


class Stops(Own):
    # Rank 1 receives SIGTERM once, as it draws task 47: the last of iteration 2 of epoch 2.
    def changed(self, task, indices):
        if RANK == 1 and 47 in indices and not os.path.exists("stopped"):
            open("stopped", "w").close()
            os.kill(os.getpid(), signal.SIGTERM)
        return task


class Lacking(Own):
    def changed(self, task, indices):
        if RANK == 1:
            raise OSError("not on this machine")
        return task


def nan(split, seed):
    return Nan(split)


def stops(split, seed):
    return Stops(split, shots=5, queries=5, seed=seed)


def lacking(split, seed):
    return Lacking(split)
"""

RUNS = {
    "even": ["sines.yaml"],
    "odd": ["sines.yaml", "training.tasks=3"],
    "one task": ["sines.yaml", "training.tasks=1", "training.engine=vmap"],
    "glyphs": ["glyphs.yaml"],
}
TODO = {name: ["train", *arguments, f"run_dir=two/{name}"] for name, arguments in RUNS.items()} | {
    "evaluate": ["evaluate", "two/odd", "--tasks", "3", "--split", "val"],
    "from one to two": ["train", "--resume", "one/first half"],
    "stopped": ["train", "sines.yaml", "data=own_code:stops", "run_dir=two/stopped"],
    "after the stop": ["train", "--resume", "two/stopped"],
    "wrong key": ["train", "sines.yaml", "training.lr=-1", "run_dir=two/none"],
    "wrong net": ["train", "glyphs.yaml", "data=sinusoid", "run_dir=two/none"],
    "wrong argument": ["train", "sines.yaml", "--epochs", "3"],
    "in use": ["train", "sines.yaml", "run_dir=two/even"],
    "wrong on one rank": ["train", "sines.yaml", "data=own_code:lacking", "run_dir=two/none"],
    "not finite": ["train", "sines.yaml", "data=own_code:nan", "run_dir=two/nan"],
}


@pytest.fixture(scope="module", autouse=True)
def _no_reports():
    """They take longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metahpo.cli._write_report", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for name, text in {"sines.yaml": SINES, "glyphs.yaml": GLYPHS, "own_code.py": textwrap.dedent(OWN)}.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def two(folder, start, monkeypatch):
    """What each of two ranks got of each item of TODO: [exit code, stdout, stderr]; everything in one start."""
    monkeypatch.chdir(folder)
    if not (folder / "todo.json").exists():
        assert main(["train", "sines.yaml", "--until-epoch", "1", "run_dir=one/first half"]) == 0
        (folder / "todo.json").write_text(json.dumps(list(TODO.values())))
        # As torchrun does, which would import torch three times more: the ranks meet at a store that is not theirs.
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        group |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", **ENVIRONMENT}
        program = Path(__file__).with_name("ranks_program.py").read_text()
        children = [start(program, RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(2)]
        for code, _, err in [child.finished() for child in children]:
            assert code == 0, err
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return {name: [rank[index] for rank in ranks] for index, name in enumerate(TODO)}


def state(run_dir: Path) -> dict:
    return CheckpointStore(run_dir / "checkpoints").latest()[1]


def assert_same(run_dir: Path, expected: Path, tolerance: float = 1e-6) -> None:
    """The newest checkpoints of two runs hold the same parameters, optimizer and history."""
    found, wanted = state(run_dir), state(expected)
    assert (found["epoch"], found["iteration"]) == (wanted["epoch"], wanted["iteration"])
    for key in ("learner", "optimizer"):
        torch.testing.assert_close(found[key], wanted[key], rtol=tolerance, atol=tolerance)
    for row, other in zip(found["history"], wanted["history"], strict=True):
        assert row == pytest.approx(other, rel=1e-5)


@pytest.fixture
def one(folder, monkeypatch):
    """Makes the run of one process by name of RUNS."""
    monkeypatch.chdir(folder)

    def run(name: str) -> Path:
        if not (folder / "one" / name).exists():
            with torch.random.fork_rng():
                assert main(["train", *RUNS[name], f"run_dir=one/{name}"]) == 0
        return folder / "one" / name

    return run


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_give_the_run_of_one_process(folder, two, one, name):
    (code, out, err), other = two[name]
    assert (code, err) == (0, "") and other == [0, "", ""], "rank 0 alone speaks"
    assert ", 2 ranks, run directory" in out and "test tasks" in out
    assert_same(folder / "two" / name, one(name))
    tests = [json.loads((folder / run / name / "test.json").read_text())["rows"] for run in ("two", "one")]
    assert tests[0].keys() == tests[1].keys()
    for row in tests[0]:
        assert tests[0][row] == pytest.approx(tests[1][row], rel=1e-5)
    assert json.loads((folder / "two" / name / "versions.json").read_text())["ranks"] == "2"


def test_evaluating_on_two_ranks_gives_the_figures_of_one(folder, two, one):
    assert [code for code, _, _ in two["evaluate"]] == [0, 0]
    assert main(["evaluate", str(one("odd")), "--tasks", "3", "--split", "val"]) == 0
    rows = [json.loads((folder / run / "odd" / "val.json").read_text())["rows"] for run in ("two", "one")]
    assert rows[0]["best"] == pytest.approx(rows[1]["best"], rel=1e-5)


def test_a_run_goes_on_with_more_ranks(folder, two, one):
    assert "at epoch 2, iteration 1" in two["from one to two"][0][1]
    assert_same(folder / "one" / "first half", one("even"))


def test_a_signal_to_one_rank_stops_all_at_the_same_step(folder, two, one):
    assert [code for code, _, _ in two["stopped"]] == [143, 143]
    assert two["stopped"][0][2] == "metahpo: stopped by SIGTERM\n"
    # It is asked at the draw of iteration 2, whose step tells the others.
    assert "at epoch 2, iteration 3" in two["after the stop"][0][1]
    assert_same(folder / "two" / "stopped", one("even"))


@pytest.mark.parametrize(
    ("name", "code", "rank", "expected"),
    [
        ("wrong key", 2, 0, "sines.yaml: training.lr: should be greater than 0, found -1"),
        ("wrong net", 2, 0, "net conv4 takes images [C, H, W]; the data gives [1]; choose mlp"),
        ("wrong argument", 2, 0, "unrecognized arguments: --epochs 3"),
        ("in use", 2, 0, "two/even already holds a run"),
        ("wrong on one rank", 2, 1, "task 0 of 80 fails: OSError: not on this machine"),
        ("not finite", 1, 0, "epoch 1, iteration 7: the loss of task 27 is not finite (parameters are as before"),
    ],
)
def test_a_mistake_is_told_in_one_line_by_one_rank(folder, two, name, code, rank, expected):
    assert [found for found, _, _ in two[name]] == [code, code]
    assert expected in two[name][rank][2]
    assert [len(err.splitlines()) for _, _, err in two[name]] == [rank == 0, rank == 1]
    assert not (folder / "two" / "none").exists()


TORCHRUN = """
from torch.distributed.run import main
main(["--standalone", "--nproc-per-node", "2", "-m", "metahpo", *{arguments}])
"""


def test_sigterm_to_torchrun_saves_and_one_process_goes_on(folder, start, monkeypatch):
    longer = ["train", "sines.yaml", "training.epochs=3", "training.iterations=60"]
    monkeypatch.chdir(folder)
    child = start(TORCHRUN.format(arguments=[*longer, "run_dir=killed"]), **ENVIRONMENT)
    child.wait_for("epoch 1/3")
    child.send_signal(signal.SIGTERM)
    code, _, err = child.finished()
    assert code not in (0, None)
    assert err.count("stopping after this step") == err.count("metahpo: stopped by SIGTERM") == 1
    newest = CheckpointStore(folder / "killed" / "checkpoints").list()[-1]
    assert (1, 0) <= position(newest) < (3, 0)
    assert main(["train", "--resume", "killed"]) == 0
    assert main([*longer, "run_dir=whole"]) == 0
    assert_same(folder / "killed", folder / "whole", 1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("tasks", [1, 2, 5, 8, 9])
def test_the_shares_are_the_batch(size, tasks):
    numbers = range(100, 100 + tasks)
    shares = [Ranks(rank, size).share(numbers) for rank in range(size)]
    assert all(shares), "every rank has something to run"
    assert sorted({number for share in shares for number in share}) == list(numbers)
    if tasks >= size:
        assert sum(map(len, shares)) == tasks
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_ranks_draw_different_randomness_and_one_process_what_it_always_did():
    assert Ranks().seed == ()
    assert Ranks(0, 2).seed != Ranks(1, 2).seed
