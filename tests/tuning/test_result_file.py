"""result.pt notices its own damage."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from metahpo.errors import CheckpointError
from metahpo.tuning import load_result
from metahpo.tuning.run import content_sum, save_result

CONTENT = {
    "rule": "sgd",
    "groups": {"0": ["weight", "bias"]},
    "values": {"lr": torch.tensor([[0.5, 0.25]]), "labels": torch.tensor([1, 2]), "one": torch.tensor(3.0)},
    "kept": (torch.tensor([True, False]), torch.zeros(0), torch.tensor([1.5], dtype=torch.bfloat16)),
}


@pytest.fixture
def path(tmp_path):
    save_result(tmp_path / "result.pt", SimpleNamespace(tensors=lambda: CONTENT))
    return tmp_path / "result.pt"


def test_what_is_saved_is_read_back_and_by_torch_too(path):
    assert str(load_result(path)) == str(CONTENT)
    whole = torch.load(path, weights_only=True)
    assert whole.pop("checksum") == content_sum(CONTENT)
    assert str(whole) == str(CONTENT)


def test_no_figure_changes_unnoticed(path):
    data = path.read_bytes()
    noticed = 0
    for position in range(0, len(data), 37):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        try:
            found = load_result(path)
        except CheckpointError:
            noticed += 1
            continue
        # Of the archive around it; or of the name of the checksum, which then counts as one more entry.
        assert str({name: found[name] for name in CONTENT}) == str(CONTENT)
    assert noticed > 10


@pytest.mark.parametrize(
    "other",
    [
        {**CONTENT, "rule": "adam"},
        {**CONTENT, "values": {**CONTENT["values"], "lr": torch.tensor([[0.5, 0.5]])}},
        {**CONTENT, "values": {**CONTENT["values"], "lr": torch.tensor([0.5, 0.25])}},
        {**CONTENT, "values": {**CONTENT["values"], "labels": torch.tensor([1.0, 2.0])}},
        {**CONTENT, "groups": {"0": ["weight"], "1": ["bias"]}},
    ],
)
def test_the_checksum_is_of_values_shapes_types_and_names(path, other):
    torch.save({**other, "checksum": content_sum(CONTENT)}, path)
    with pytest.raises(CheckpointError, match=r"result\.pt is damaged: its checksum is not"):
        load_result(path)


def test_files_of_older_versions_and_of_others(path):
    torch.save(CONTENT, path)
    assert str(load_result(path)) == str(CONTENT)
    torch.save([1], path)
    with pytest.raises(CheckpointError, match="not the result of a tuning: it holds list"):
        load_result(path)
