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
