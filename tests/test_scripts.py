"""The proofs under scripts/ that are too slow to run whole, in their quick modes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def test_a_killed_run_resumes_to_the_same_end(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, SCRIPTS / "prove_resume.py", "--quick", "--json", figures]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(figures.read_text())
    assert result["same"]
    assert len(result["rows"]) == 3


def test_mixed_mode_with_remat_takes_a_fraction_of_the_memory(tmp_path):
    figures, picture = tmp_path / "figures.json", tmp_path / "memory.png"
    command = [sys.executable, SCRIPTS / "benchmark_memory.py", "--quick", "--json", figures, "--plot", picture]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(figures.read_text())["rows"]
    assert len(rows) == 2 * 5
    assert all(row["relative_error"] < 1e-4 for row in rows)
    peaks = {(row["gradient"], row["remat"]): row["peak_bytes"] for row in rows if row["steps"] == 16}
    # Over ten times at 64 steps of the whole transformer; these are 16 of a small one.
    assert peaks["reverse", "none"] > 4 * peaks["mixed", "sqrt"]
    assert peaks["reverse", "none"] > 2 * peaks["reverse", "sqrt"]
    assert picture.stat().st_size > 0
