"""The notebooks' code, run from top to bottom with fewer steps."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
SMALL = [
    ("filters=32", "filters=4"),
    ("val_tasks=100", "val_tasks=4, engine='loop'"),
    ("evaluate(test, 200)", "evaluate(test, 4)"),
]
# What makes each a matter of seconds: (as it stands in the notebook, as it runs here).
QUICK = {
    "tune_rates": [("STEPS, OUTER_STEPS = 100, 40", "STEPS, OUTER_STEPS = 8, 2"), ("range(5)", "range(2)")],
    "few_shot": [("EPOCHS, ITERATIONS = 5, 100", "EPOCHS, ITERATIONS = 1, 2"), *SMALL],
    # README's test has the same learner under the engines that record it.
    "write_a_learner": [
        ("EPOCHS, ITERATIONS = 5, 60", "EPOCHS, ITERATIONS = 1, 2"),
        ("ways=3)", 'ways=3, engines=["loop", "vmap"])'),
        *SMALL,
    ],
}


def test_each_notebook_has_its_test():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(QUICK)


@pytest.mark.parametrize("name", QUICK)
def test_notebook_runs(name, capsys):
    matplotlib.use("Agg")
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    text = "\n".join(code)
    for old, new in QUICK[name]:
        assert old in text, f"{name} no longer holds {old!r}"
        text = text.replace(old, new)
    names: dict = {}
    exec(compile(text, name, "exec"), names)
    assert "learnt" in capsys.readouterr().out
    if name == "tune_rates":
        assert names["rates"].values["lr"].shape == (6, 4)
    else:
        assert len(names["history"]) == 1
    # What is stored was run to the end, without an error.
    stored = [output for cell in cells for output in cell.get("outputs", [])]
    assert stored
    assert all(output["output_type"] != "error" for output in stored)
