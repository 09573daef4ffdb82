"""Ranks match tensors by name, and rank 0's state is everyone's."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("ranks_by_name.py")


@pytest.fixture(scope="module")
def one():
    """What one process gets."""
    return runpy.run_path(str(PROGRAM))["results"](0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture
def two(folder, start, monkeypatch):
    """What each of two ranks gets."""
    monkeypatch.chdir(folder)
    if not (folder / "0.pt").exists():
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        group |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        group |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        children = [start(PROGRAM.read_text(), RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(2)]
        for code, _, err in [child.finished() for child in children]:
            assert code == 0, err
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", ["order", "stopped"])
def test_ranks_get_what_one_process_gets(two, one, case):
    for found in two:
        assert found[case]["weights"].keys() == one[case]["weights"].keys()
        for name, value in one[case]["weights"].items():
            torch.testing.assert_close(found[case]["weights"][name], value, rtol=1e-12, atol=1e-12)
        assert len(found[case]["history"]) == 2
        for row, wanted in zip(found[case]["history"], one[case]["history"]):
            assert row == pytest.approx(wanted, rel=1e-10, nan_ok=True)


def test_a_metric_of_some_tasks_alone_is_among_those(one):
    assert any("train_sometimes" in row for row in one["order"]["history"])


def test_before_a_training_rank_0s_weights_and_buffers_are_evaluated(two, one):
    for found in two:
        assert found["evaluated"] == pytest.approx(one["evaluated"], rel=1e-10)


def test_ranks_whose_nets_differ_are_refused_by_name(two):
    own, other = (found["refused"] for found in two)
    assert own == ""
    assert other.endswith("'module.net.more.weight' is torch.float64 [3, 3] on rank 1, expected none, as on rank 0")
