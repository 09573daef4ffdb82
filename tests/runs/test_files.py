"""JSON files that notice their own damage."""

from __future__ import annotations

import hashlib
import json

import pytest

from metahpo.errors import DataError
from metahpo.runs.files import read_json, write_json

CONTENT = {"tasks": 3, "rows": {"best": {"loss": 0.125, "ci": 2.0}}}


def test_the_checksum_in_a_file_is_that_of_its_content(tmp_path):
    path = tmp_path / "test.json"
    assert read_json(path) is None
    write_json(path, CONTENT)
    assert read_json(path) == CONTENT
    expected = hashlib.sha256(json.dumps(CONTENT, sort_keys=True).encode()).hexdigest()[:16]
    assert json.loads(path.read_text()) == {**CONTENT, "checksum": expected}


def test_no_figure_changes_unnoticed(tmp_path):
    path = tmp_path / "test.json"
    write_json(path, CONTENT)
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            found = read_json(path)
        except DataError:
            continue
        # The name of the checksum alone: then it counts as one more entry.
        assert {name: found[name] for name in CONTENT} == CONTENT


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000])
def test_what_is_no_object_is_named(tmp_path, text):
    path = tmp_path / "test.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"test\.json is damaged"):
        read_json(path)


def test_files_of_older_versions_are_read(tmp_path):
    path = tmp_path / "test.json"
    path.write_text(json.dumps(CONTENT))
    assert read_json(path) == CONTENT
