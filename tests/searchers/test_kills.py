"""The proof that a search survives the death of its processes, in its quick mode."""

from __future__ import annotations

import json


def test_a_search_survives_the_death_of_a_worker_and_of_its_coordinator(tmp_path, script):
    figures = tmp_path / "figures.json"
    code, out, err = script("prove_kills", "--quick", "--json", figures)
    assert code == 0, out + err
    result = json.loads(figures.read_text())
    assert set(result) == {"machine", "rows", "promises"}
    assert len(result["promises"]) == 9
    assert all(result["promises"].values())
    calm, killed = result["rows"]
    assert (killed["killed_workers"], killed["killed_coordinators"]) == (1, 1)
    assert killed["attempts"] > calm["attempts"] == killed["trials"] == 6
    assert killed["deaths_noted"] == 1
