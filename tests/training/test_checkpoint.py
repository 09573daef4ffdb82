"""Checkpoints: whole or absent, damage noticed, code refused."""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile

import pytest
import torch

from metahpo.errors import CheckpointError
from metahpo.training.checkpoint import (
    CheckpointStore,
    DamagedCheckpoint,
    load_checkpoint,
    load_learner,
    position,
    write_atomically,
)


def state(epoch: int = 1, iteration: int = 0) -> dict:
    return {
        "epoch": epoch,
        "iteration": iteration,
        "learner": {"weight": torch.full((2, 3), float(epoch))},
        "optimizer": {},
        "history": [],
        "partial": {},
        "settings": {},
    }


def filled(folder, epochs: int, **kwargs) -> CheckpointStore:
    store = CheckpointStore(folder)
    for epoch in range(1, epochs + 1):
        store.save(state(epoch), epoch, **kwargs)
    return store


def positions(store: CheckpointStore) -> list[tuple[int, int]]:
    return [position(path) for path in store.list()]


class Malicious:
    """Pickles as a call that creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def forged(folder, content) -> os.PathLike:
    """A file with any content under the name that its checksum asks for."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    path = folder / f"epoch-0009.{hashlib.sha256(data).hexdigest()[:16]}.pt"
    path.write_bytes(data)
    return path


def test_a_name_tells_the_position_and_the_checksum_of_the_content(tmp_path):
    store = CheckpointStore(tmp_path / "new" / "folder")
    whole, partial = store.save(state(3), 3), store.save(state(3, 17), 3, 17)
    assert re.fullmatch(r"epoch-0003\.[0-9a-f]{16}\.pt", whole.name)
    assert re.fullmatch(r"epoch-0003-step-00017\.[0-9a-f]{16}\.pt", partial.name)
    assert whole.name.split(".")[1] == hashlib.sha256(whole.read_bytes()).hexdigest()[:16]
    assert positions(store) == [(3, 0), (3, 17)]
    assert store.of_epoch(3) == whole


def test_equal_states_have_equal_names_and_plain_torch_reads_them(tmp_path):
    first = CheckpointStore(tmp_path / "a").save(state(), 1)
    second = CheckpointStore(tmp_path / "b").save(state(), 1)
    assert first.name == second.name
    read = torch.load(first, weights_only=True)
    assert read["epoch"] == 1
    assert torch.equal(read["learner"]["weight"], torch.ones(2, 3))


ROW = {"epoch": 1, "val_loss": 0.5}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"epoch": -1}, "epoch: found -1, expected at least 0"),
        ({"iteration": -3}, "iteration: found -3, expected at least 0"),
        ({"history": [ROW, 3]}, "history: row 2 has no epoch and val_loss"),
        ({"history": [{"epoch": 1}]}, "history: row 1 has no epoch and val_loss"),
        ({"history": [{**ROW, "lr": "high"}]}, "history: row 1: 'lr' is 'high', expected a number"),
        ({"partial": {"count": None}}, "partial: found {'count': None}, expected a count of steps, and sums"),
        ({"partial": {"count": -1}}, "expected a count of steps"),
        ({"partial": {"count": 1, "sums": [1]}}, "sums and counts by name"),
        ({"partial": {"count": 1, "sums": None, "counts": {}}}, "sums and counts by name"),
        ({"partial": {"count": 1, "sums": {"loss": 1.0}, "counts": None}}, "sums and counts by name"),
        ({"partial": {"count": 1, "sums": {"loss": 1.0}, "counts": {"loss": "1"}}}, "'loss' is '1', expected a number"),
        ({"partial": {"count": 1, "sums": {"loss": "low"}}}, "partial: 'loss' is 'low', expected a number"),
    ],
)
def test_wrong_content_under_a_right_checksum_is_named(tmp_path, change, says):
    path = CheckpointStore(tmp_path).save({**state(), **change}, 1)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tunings_warnings_are_lines(tmp_path):
    store = CheckpointStore(tmp_path, {"warnings": list})
    assert load_checkpoint(store.save({"warnings": ["a line"]}, 1), store.content) == {"warnings": ["a line"]}
    with pytest.raises(CheckpointError, match=r"warnings: found \[\{\}\], expected lines of text"):
        load_checkpoint(store.save({"warnings": [{}]}, 2), store.content)


def test_compressed_entries_are_refused_before_they_are_unpacked(tmp_path):
    plain = CheckpointStore(tmp_path).save(state(), 1)
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match=r"is compressed, expected what torch\.save writes; refused"):
        load_checkpoint(packed)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_damage_is_noticed_and_the_one_before_is_taken(tmp_path, damage):
    store = filled(tmp_path, 2)
    before, newest = store.list()
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes({"flip": bytes(data), "truncate": data[:-10], "empty": b""}[damage])
    with pytest.raises(DamagedCheckpoint, match=f"{newest.name} is damaged: its checksum is"):
        load_checkpoint(newest)
    path, read, (line,) = store.latest()
    assert (path, read["epoch"]) == (before, 1)
    assert newest.name in line and "damaged" in line


def test_a_file_under_another_name_is_checked_too(tmp_path):
    path = tmp_path / "model.pt"
    for garbage in (b"", b"not a checkpoint", filled(tmp_path, 1).list()[0].read_bytes()[:200]):
        path.write_bytes(garbage)
        with pytest.raises(DamagedCheckpoint, match=r"model\.pt is damaged"):
            load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"cannot read checkpoint .*gone\.pt: No such file"):
        load_checkpoint(tmp_path / "gone.pt")
    with pytest.raises(CheckpointError, match="is not named like a checkpoint"):
        position(path)


def test_nothing_whole_and_nothing_at_all_are_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        CheckpointStore(tmp_path).latest()
    store = filled(tmp_path, 2)
    names = [path.name for path in store.list()]
    for path in store.list():
        path.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="no whole checkpoint in") as caught:
        store.latest()
    assert all(name in str(caught.value) for name in names)
    with pytest.raises(CheckpointError, match="no checkpoint of epoch 7"):
        store.of_epoch(7)


def test_the_two_newest_and_the_best_are_kept(tmp_path):
    store = filled(tmp_path, 5, keep=[2])
    assert positions(store) == [(2, 0), (4, 0), (5, 0)]
    store.save(state(5, 3), 5, 3, keep=[2])
    assert positions(store) == [(2, 0), (5, 0), (5, 3)]
    store.save(state(6), 6, keep=[4, 5])
    assert positions(store) == [(5, 0), (5, 3), (6, 0)]


def test_saving_a_position_again_replaces_its_file_and_clears_strays(tmp_path):
    store = filled(tmp_path, 2)
    (tmp_path / ".epoch-0002.pt.123.tmp").write_bytes(b"half")
    other = {**state(2), "learner": {"weight": torch.zeros(2, 3)}}
    newest = store.save(other, 2)
    assert positions(store) == [(1, 0), (2, 0)]
    assert store.list()[-1] == newest
    assert not list(tmp_path.glob(".*"))


def test_foreign_files_are_left_alone(tmp_path):
    (tmp_path / "mine.pt").write_bytes(b"")
    (tmp_path / "epoch-0001.pt").write_bytes(b"")
    store = filled(tmp_path, 4)
    assert positions(store) == [(3, 0), (4, 0)]
    assert (tmp_path / "mine.pt").exists() and (tmp_path / "epoch-0001.pt").exists()


def test_code_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "marker"
    path = forged(tmp_path, {**state(9), "history": [Malicious(marker)]})
    # The file does what it threatens when it is read without care.
    torch.load(path, weights_only=False)
    assert marker.is_dir()
    marker.rmdir()
    with pytest.raises(CheckpointError, match="holds code or objects other than tensors and plain values; refused"):
        load_checkpoint(path)
    # Not passed over as damaged: its checksum is right, so somebody made it so.
    filled(tmp_path, 1)
    with pytest.raises(CheckpointError, match="refused"):
        CheckpointStore(tmp_path).latest()
    assert not marker.exists()


@pytest.mark.parametrize("content", [[1], {"epoch": 1}, {**state(), "epoch": "1"}, {**state(), "learner": 3}])
def test_a_file_that_is_no_checkpoint_of_ours_is_refused(tmp_path, content):
    with pytest.raises(CheckpointError, match=r"is not a metahpo checkpoint: it has no '(epoch|iteration|learner)'"):
        load_checkpoint(forged(tmp_path, content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(weight=torch.zeros(4, 3)), r"'weight' is \(4, 3\), expected \(2, 3\)"),
        (lambda s: s.pop("bias"), r"'bias' is nothing, expected \(2,\)"),
        (lambda s: s.update(more=torch.zeros(1)), r"'more' is \(1,\), expected nothing"),
        (lambda s: s.update(weight=3), r"'weight' is int, expected \(2, 3\)"),
    ],
)
def test_the_entry_that_does_not_fit_the_learner_is_named(change, message):
    learner = torch.nn.Linear(3, 2)
    weight = learner.weight.detach().clone()
    entries = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    change(entries)
    with pytest.raises(CheckpointError, match=f"run/x.pt does not fit the learner: {message}"):
        load_learner(learner, entries, "run/x.pt")
    assert torch.equal(learner.weight, weight)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"
