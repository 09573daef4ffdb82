"""The proofs under scripts/ that are too slow to run whole, in their quick modes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from metahpo.training.engines import ENGINES

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def test_a_killed_run_resumes_to_the_same_end(tmp_path, script):
    figures = tmp_path / "figures.json"
    code, out, err = script("prove_resume", "--quick", "--json", figures)
    assert code == 0, f"{code}{out}{err}"
    result = json.loads(figures.read_text())
    assert result["same"]
    assert len(result["rows"]) == 3


def test_mixed_mode_with_remat_takes_a_fraction_of_the_memory(tmp_path, script):
    figures, picture = tmp_path / "figures.json", tmp_path / "memory.png"
    code, out, err = script("benchmark_memory", "--quick", "--json", figures, "--plot", picture)
    assert code == 0, out + err
    rows = json.loads(figures.read_text())["rows"]
    assert len(rows) == 2 * 5
    assert all(row["relative_error"] < 1e-4 for row in rows)
    peaks = {(row["gradient"], row["remat"]): row["peak_bytes"] for row in rows if row["steps"] == 16}
    # Over ten times at 64 steps of the whole transformer; these are 16 of a small one.
    assert peaks["reverse", "none"] > 4 * peaks["mixed", "sqrt"]
    assert peaks["reverse", "none"] > 2 * peaks["reverse", "sqrt"]
    assert picture.stat().st_size > 0


def test_one_step_brings_a_policy_closer_to_unseen_goals(tmp_path, script):
    figures, picture = tmp_path / "figures.json", tmp_path / "paths.png"
    code, out, err = script("prove_navigation", "--quick", "--json", figures, "--plot", picture)
    assert code == 0, out + err
    rows = json.loads(figures.read_text())["rows"]
    assert [row["learner"] for row in rows] == ["MAML", "FOMAML"]
    assert all(row["before"] < row["after"] < row["best"] < 0 for row in rows)
    assert all(1 < row["low"] < row["closer"] < row["high"] for row in rows)
    assert picture.stat().st_size > 0


def test_ten_distilled_digits_beat_ten_real_ones(tmp_path, script):
    figures, picture = tmp_path / "figures.json", tmp_path / "images.png"
    code, out, err = script("prove_distillation", "--quick", "--json", figures, "--picture", picture)
    assert code == 0, out + err
    accuracies = {row["training"]: row["accuracy"] for row in json.loads(figures.read_text())["rows"]}
    assert accuracies["distilled images"] > 0.9 * accuracies["whole training set"]
    assert accuracies["random real images"] < 0.7 * accuracies["whole training set"]
    assert picture.stat().st_size > 0


def test_every_strategy_is_measured_and_the_exact_ones_are_exact(tmp_path, script):
    figures, picture = tmp_path / "figures.json", tmp_path / "horizon.png"
    code, out, err = script("benchmark_hypergradients", "--quick", "--json", figures, "--plot", picture)
    assert code == 0, out + err
    result = json.loads(figures.read_text())
    assert result["left_out"] == []
    keys = {"net", "strategy", "steps", "seconds", "cpu_seconds", "peak_bytes", "relative_error", "note"}
    assert all(set(row) == keys and row["seconds"] > 0 for row in result["rows"])
    errors = {(row["strategy"], row["steps"]): row["relative_error"] for row in result["rows"]}
    assert len(errors) == len(result["rows"]) == 2 * len({name for name, _ in errors})
    exact = [name for name, _ in errors if name.startswith("Unroll(") or name == "Forward()"]
    # Float32 rounds: a figure of zero would be the reference compared with itself.
    assert all(0 < errors[name, steps] < 1e-5 for name in exact for steps in (1, 10))
    assert 0 < errors["FiniteDifference()", 1] < 1e-4 < 0.1 < errors["FiniteDifference()", 10]
    assert errors["PES(8)", 10] is None
    assert picture.stat().st_size > 0
    code, _, err = script("benchmark_hypergradients", "--steps", "1,x")
    assert (code, err.count("\n")) == (2, 1)
    assert "expected numbers of steps of at least 1, as 1,10,100, found '1,x'" in err


def test_gradient_search_is_raced_against_random_search(tmp_path, script):
    figures, picture = tmp_path / "figures.json", tmp_path / "race.png"
    code, out, err = script("benchmark_gradient_search", "--quick", "--json", figures, "--plot", picture)
    assert code == 0, out + err
    rows = json.loads(figures.read_text())["rows"]
    assert [(row["table"], row["searcher"]) for row in rows] == [
        (table, searcher) for table in ("one", "layers") for searcher in ("random", "gradient")
    ]
    for row in rows:
        assert row["evaluations"] >= 1 and row["seconds"] > 0 and row["regret"] >= 0
        assert row["course"][-1][1] == row["val_loss"]
    assert picture.stat().st_size > 0
    code, _, err = script("benchmark_gradient_search", "--seeds", "0")
    assert (code, err.count("\n")) == (2, 1)
    assert "--seeds and --seconds: expected at least 1 and above 0, found 0" in err


def test_the_proofs_of_tuning_run(tmp_path, script):
    figures = tmp_path / "figures.json"
    code, out, err = script("prove_tuning", "--quick", "--json", figures)
    assert code == 0, out + err
    rows = json.loads(figures.read_text())["rows"]
    decays = [row["name"] for row in rows if row["what"] == "decay"]
    assert decays == ["single"] * 3 + ["by parameter", "best single, train + val"]
    tuned, untuned = (row for row in rows if row["what"] == "overfit")
    assert tuned["val_loss"] < untuned["val_loss"]
    cleaned = {row["name"]: row for row in rows if row["what"] == "clean"}
    others = ("contradicted by a regression on trusted ones", "gradient weight below 1/2")
    assert cleaned["clean"]["f1"] > max(cleaned[rule]["f1"] for rule in others)
    assert cleaned["no cleaning"]["suspects"] == 0


def test_the_inner_loop_benchmark_measures_and_compares(tmp_path, script):
    def figures(*flags):
        path = tmp_path / "figures.json"
        code, out, err = script("benchmark_inner_loop", "--quick", "--float64", "--json", path, *flags)
        assert code == 0, out + err
        return json.loads(path.read_text())

    # All on a net with batch norm and on one without; on the others those that are always there.
    everywhere = ("loop", "vmap", "plain_loop", "plain_vmap")
    result = figures("--workload", "omniglot", "--workload", "mlp")
    others = [part for name in ("maml_pp", "mini_imagenet", "resnet12", "transformer") for part in ("--workload", name)]
    rows = result["rows"] + figures(*others, *(part for name in everywhere for part in ("--only", name)))["rows"]
    assert {"cpu", "cores", "threads", "gpu", "torch"} <= set(result["machine"])
    names: dict[str, set[str]] = {}
    for row in rows:
        names.setdefault(row["workload"], set()).add(row["name"])
        assert row["device"] == "cpu"
        assert row["kind"] == ("engine" if row["name"] in ENGINES else "peer")
        assert 0 < row["min_s"] <= row["median_s"]
        assert row["peak_bytes"] is None or row["peak_bytes"] >= 0
        # Float32 rounds: a figure of zero would be the reference compared with itself.
        assert 0 < row["relative_error"] <= 1e-5
        assert row["kind"] == "peer" or row["relative_error_float64"] <= 1e-10
    assert set(names) == {"omniglot", "maml_pp", "mini_imagenet", "resnet12", "mlp", "transformer"}
    assert all(found >= set(everywhere) for found in names.values())


def test_a_script_is_a_program(start):
    path = SCRIPTS / "benchmark_inner_loop.py"
    # As Python does with a file that it is given.
    program = f"sys.argv, sys.path[0] = [{str(path)!r}, '--workload', 'omniglut'], {str(SCRIPTS)!r}\n"
    code, _, err = start(f"import runpy, sys\n{program}runpy.run_path({str(path)!r}, run_name='__main__')").finished()
    assert code == 2
    assert "omniglut" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--rounds", "0"], "expected a whole number of at least 1, found '0'"),
        (["--json", "no/such/figures.json"], "--json no/such/figures.json: no such folder"),
    ],
)
def test_bad_flags_of_the_benchmark_give_one_line(script, flags, expected):
    code, _, err = script("benchmark_inner_loop", *flags)
    assert code == 2
    assert expected in err
    assert err.count("\n") == 1


def test_a_wrong_gradient_is_told():
    sys.path.insert(0, str(SCRIPTS))
    try:
        measure = importlib.import_module("inner_loop.measure")
    finally:
        sys.path.remove(str(SCRIPTS))
    right = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    wrong = {"a": torch.tensor([3.0, 0.5]), "b": torch.tensor([[4.0]])}
    assert measure.relative_error(wrong, right) == pytest.approx(0.1)
    assert measure.union([(0.0, 2.0), (1.0, 3.0), (1.5, 2.5), (5.0, 6.0)]) == 4.0


def test_learners_are_compared_and_a_run_that_is_there_is_not_run_again(tmp_path, script):
    figures, picture = tmp_path / "figures.json", tmp_path / "learners.png"
    flags = ["--quick", "--folder", tmp_path / "runs", "--json", figures, "--plot", picture]
    results = []
    for _ in range(2):
        code, out, err = script("compare_learners", *flags)
        assert code == 0, out + err
        results.append(json.loads(figures.read_text())["rows"])
    first, second = results
    assert first == second
    assert {row["learner"] for row in first} == {"maml", "proto_net"}
    assert all(0 <= row["accuracy"] <= 1 and row["megabytes"] > 0 for row in first)
    assert picture.stat().st_size > 0
    code, _, err = script("compare_learners", "--learner", "mamml")
    assert (code, err.count("\n")) == (2, 1)
    assert "--learner: no 'mamml'; known: anil," in err


def test_a_sample_of_faults_is_held(tmp_path, script):
    figures = tmp_path / "figures.json"
    code, out, err = script("proofs.faults", "--quick", "--json", figures)
    assert code == 0, out + err
    rows = json.loads(figures.read_text())["rows"]
    assert len(rows) > 10 and all(row["outcome"] in ("held", "skipped") for row in rows)
