from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest

from metahpo.searchers import TrialRecord

NAMES = ["random", "successive_halving", "hyperband", "asha", "bohb"]


def test_the_race_runs_goes_on_and_proves_its_promotions(tmp_path, script):
    figures, picture = tmp_path / "figures.json", tmp_path / "race.png"
    flags = ["--quick", "--folder", tmp_path / "race", "--json", figures]
    code, out, err = script("benchmark_multifidelity", *flags, "--searcher", "hyperband")
    assert code == 0, out + err
    two = json.loads(figures.read_text())["rows"]
    code, out, err = script("benchmark_multifidelity", *flags, "--plot", picture)
    assert code == 0, out + err
    content = json.loads(figures.read_text())
    rows = content["rows"]
    assert {"cpu", "cores", "torch"} <= set(content["machine"])
    assert [row["searcher"] for row in rows] == NAMES
    # Those that had been run already were not run again.
    assert [two[0], two[1]] == [{**rows[i], "regret": two[j]["regret"]} for j, i in enumerate((0, 2))]
    control = rows[0]
    assert (control["evaluations"], control["epochs"]) == (4, 16)
    for row in rows:
        assert {"table", "searcher", "seed", "evaluations", "regret", "seconds"} <= set(row)
        assert row["epochs"] < 16 or row is control
        assert 0 < row["accuracy"] <= 1
        assert row["accuracy"] != row["test_accuracy"]
        reached = row["epochs_to_reach"]
        assert (reached is not None) == (row["accuracy"] >= control["accuracy"])
        assert reached is None or reached <= (32 / 3 if row is not control else 16)
    assert min(row["regret"] for row in rows) == 0
    promoted = int(out.partition("promoted trials: ")[2].partition(";")[0])
    assert promoted > 10
    assert "speaking against one having gone on from its parent: 0\n" in out
    assert picture.stat().st_size > 0


def test_a_trial_that_began_anew_is_told(script, monkeypatch):
    race = importlib.import_module("multifidelity.race")
    settings = {"lr": 0.1}
    parent = TrialRecord(0, settings, "complete", (0.5,), budget=1, reports={1: 0.5})
    notes = {"resumed_from": {"checkpoint": "00000/run/checkpoints/x.pt", "epoch": 1}, "epochs_trained": 2.0}
    child = TrialRecord(1, settings, "complete", (0.6,), budget=3, parent=0, notes=notes, reports={2: 0.6, 3: 0.6})
    assert list(race.broken_promotions([parent, child])) == []
    wrong = {
        "has other settings": {"settings": {"lr": 0.2}},
        "began from no checkpoint": {"notes": {**notes, "resumed_from": None}},
        "did not train 2 epochs": {"notes": {**notes, "epochs_trained": 3.0}},
        "reported other epochs than 2 to 3": {"reports": {1: 0.5, 2: 0.6, 3: 0.6}},
    }
    for what, change in wrong.items():
        assert any(what in line for line in race.broken_promotions([parent, replace(child, **change)]))
    whole = TrialRecord(0, settings, "complete", (0.6,), reports={1: 0.5, 2: 0.6, 3: 0.6, 4: 0.7})
    assert race.same_curves([parent, child], [whole]) == (1, 1)
    assert race.same_curves([parent, child], [replace(whole, reports={1: 0.5, 2: 0.5})]) == (1, 0)
    assert race.same_curves([parent, child], []) == (0, 0)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--seeds", "0"], "expected a whole number of at least 1, found '0'"),
        (["--searcher", "hyperbnd"], "invalid choice: 'hyperbnd'"),
        (["--json", "no/such/figures.json"], "--json no/such/figures.json: no such folder"),
    ],
)
def test_bad_flags_give_one_line(script, flags, expected):
    code, _, err = script("benchmark_multifidelity", *flags)
    assert code == 2
    assert expected in err
    assert err.count("\n") == 1
