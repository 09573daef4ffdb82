"""The benchmark of what ASHA begins with: its table, one search, what it promises."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import benchmark_rungs

    yield benchmark_rungs
    sys.modules.pop("benchmark_rungs")


def test_the_best_settings_of_a_table_are_those_that_its_seed_drew(benchmark):
    for seed in range(3):
        table = benchmark.Table(seed)
        best = min(benchmark.SPACE.grid(), key=table.final)
        assert list(best.values()) == table.best.tolist()
        assert table.final(best) == 0
        assert table.loss(best, 27) == table.loss(best, 27) != table.loss(best, 9)


def test_a_search_spends_its_epochs_and_counts_what_it_begins(benchmark):
    row = benchmark.search("random", 0, 4)
    assert row["repeats"] == 0 < row["full"]
    # 4 trainings of 27 epochs; the first rung's trials take 1 each.
    assert 30 < row["begun"] < 4 * 27
    assert row["loss"] >= 0


@pytest.mark.parametrize(("repeats", "worse", "kept"), [(0, 0.0, [True, True]), (1, 0.2, [False, False])])
def test_repeats_and_worse_losses_break_a_promise(benchmark, capsys, repeats, worse, kept):
    noise = [0.01, 0.02, 0.03, 0.05]
    rows = [
        {"searcher": name, "seed": seed, "loss": loss, "begun": 9, "repeats": 0, "full": 2}
        for name in benchmark.SEARCHERS
        for seed, loss in enumerate(noise)
    ]
    for row, more in zip(rows, noise[1:] + noise[:1]):
        row["loss"] = more + worse
        row["repeats"] = repeats
    assert list(benchmark.told(rows).values()) == kept
    assert "| may repeat | 0.0275" in capsys.readouterr().out
