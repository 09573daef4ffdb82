"""Hyper-cleaning: its gradient, what it finds, its state, and what it refuses."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from metahpo.errors import ConfigError, DataError, NetError
from metahpo.nets import MLP
from metahpo.tuning import clean
from metahpo.tuning.cleaning import CleaningTuner
from metahpo.tuning.data import Labelled, with_wrong_labels
from metahpo.tuning.settings import CleaningSettings


def blobs(count: int, seed: int) -> Labelled:
    """Three classes around three points of the plane."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 3
    centres = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]], dtype=torch.float64)
    return Labelled(centres[y] + 0.6 * torch.randn(count, 2, generator=generator, dtype=torch.float64), y)


def tuner(data: Labelled, net: nn.Module | None = None, **settings) -> CleaningTuner:
    settings = {"iterations": 6, "steps": 5, "lr": 0.5, **settings}
    return CleaningTuner(data, blobs(30, 9), net, CleaningSettings(**settings))


def test_moves_the_weights_by_the_gradient_of_the_trusted_loss():
    """Finite differences through a training written out here."""
    data, trusted = with_wrong_labels(blobs(12, 0), 0.5, 0), blobs(30, 9)
    net = MLP((2,), 3, (4,)).double()
    one = tuner(data, net, fresh=False, momentum=0.8)
    logits = torch.randn(12, dtype=torch.float64)
    one.logits.copy_(logits)
    one.step()

    def outcome(logits):
        params = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
        weights, speed = torch.sigmoid(logits) / torch.sigmoid(logits).mean(), dict.fromkeys(params, 0.0)
        for _ in range(5):
            out = torch.func.functional_call(net, params, (data.x,))
            loss = (weights * F.cross_entropy(out, data.y, reduction="none")).mean()
            grads = torch.autograd.grad(loss, list(params.values()))
            speed = {name: 0.8 * speed[name] + g for name, g in zip(params, grads)}
            params = {name: (p - 0.5 * speed[name]).detach().requires_grad_() for name, p in params.items()}
        return float(F.cross_entropy(torch.func.functional_call(net, params, (trusted.x,)), trusted.y))

    for i in range(12):
        nudge = 1e-5 * F.one_hot(torch.tensor(i), 12)
        slope = (outcome(logits + nudge) - outcome(logits - nudge)) / 2e-5
        assert float(one.logits.grad[i]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("batch", [None, 40])
def test_finds_the_wrong_labels(batch):
    right = blobs(90, 0)
    given = with_wrong_labels(right, 0.4, 0)
    wrong = set((given.y != right.y).nonzero()[:, 0].tolist())
    one = tuner(given, iterations=25, steps=10, lr=0.1, batch=batch)
    found = one.run()
    suspected = found.suspected.tolist()
    assert len(wrong & set(suspected)) >= 0.9 * max(len(wrong), len(suspected))
    assert found.weights[suspected].tolist() == sorted(found.weights[suspected].tolist())
    assert sorted(suspected + found.kept.tolist()) == list(range(90))
    assert len(found.subset(TensorDataset(*given))) == len(found.kept)
    assert set(found.pictures()) == {"weights", "curves"}
    assert f"| all | 90 | {len(suspected)} |" in found.table()
    rows = one.compare(*blobs(60, 5))
    assert list(rows) == ["kept", "all"] and rows["kept"]["loss"] < rows["all"]["loss"]
    with pytest.raises(DataError, match="found a data set of 30 examples, expected the 90 cleaned ones"):
        found.subset(TensorDataset(*blobs(30, 0)))


def test_keeps_all_where_no_label_is_wrong():
    found = tuner(blobs(90, 0), iterations=15, steps=10, lr=0.1).run()
    # What the gradient alone would have left out.
    assert int((found.gradient_weights < 0.5).sum()) > 30
    assert len(found.suspected) <= 2
    assert len(found.suspects) == len(found.suspected) == 90 - len(found.kept)
    kept = replace(found, weights=found.weights.clamp(max=0.4), gain=-0.3, error=0.2)
    assert kept.keep_all
    assert (len(kept.suspected), len(kept.kept)) == (0, 90)
    assert "Keep all 90 examples: to leave out the 90 likeliest wrong ones" in kept.table()
    assert kept.against(torch.ones(90, dtype=torch.bool))["recall"] == 0
    # Few trusted examples show no gain that is beyond luck: they have to show harm.
    few = replace(kept, gain=-0.1)
    assert not few.keep_all
    assert few.verdict.endswith("90 of 90 examples: that changes the trusted examples' loss by +0.1 ± 0.2")


def test_the_suspects_as_a_table_of_the_users_own(tmp_path):
    right = blobs(90, 0)
    given = with_wrong_labels(right, 0.2, 0)
    found = tuner(given, iterations=15, steps=10, lr=0.1).run()
    path = tmp_path / "suspects.csv"
    found.suspects.to_csv(path)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "label", "weight", "suggested_label"]
    indices = [int(row["index"]) for row in rows]
    assert indices == found.suspected.tolist()
    assert [int(row["label"]) for row in rows] == given.y[indices].tolist()
    assert [float(row["weight"]) for row in rows] == found.weights[indices].tolist()
    suggested = torch.tensor([int(row["suggested_label"]) for row in rows])
    assert (suggested == right.y[indices]).double().mean() > 0.8
    with pytest.raises(FileNotFoundError, match=r"no/such/folder\.csv"):
        found.suspects.to_csv(tmp_path / "no" / "such" / "folder.csv")


def test_goes_on_from_its_state_bit_for_bit():
    net = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 3)).double()
    given = with_wrong_labels(blobs(30, 0), 0.4, 0)
    whole, first, second = (tuner(given, net, batch=10) for _ in range(3))
    whole.run()
    first.run(2)
    torch.rand(5)
    second.load_state_dict(first.state_dict())
    second.run()
    assert second.history == whole.history
    assert torch.equal(second.logits, whole.logits)
    assert len(whole.logits.unique()) == 30


def test_images_are_shown():
    def bright_or_dark(count):
        y, generator = torch.arange(count) % 2, torch.Generator().manual_seed(count)
        return torch.rand(count, 1, 4, 4, generator=generator) + 2 * y[:, None, None, None], y

    (x, y), trusted = bright_or_dark(24), bright_or_dark(8)
    found = clean((x, torch.where(torch.arange(24) < 4, 1 - y, y)), trusted, iterations=3, steps=8, lr=0.1)
    pictures = found.pictures()
    assert set(pictures) == {"weights", "curves", "suspected"}
    assert sum(len(axis.images) for axis in pictures["suspected"].axes) == min(len(found.suspected), 40)
    assert found.suspected.sort().values.tolist() == [0, 1, 2, 3]
    values = {"weights", "suspected", "threshold", "gradient_weights", "suggested", "gain", "error"}
    assert set(found.tensors()) == values


def test_refuses_bad_input_in_one_line():
    data, trusted = blobs(12, 0), blobs(6, 1)

    def fails(error, match, data=data, trusted=trusted, **settings):
        with pytest.raises(error, match=match) as caught:
            clean(data, trusted, **settings)
        assert "\n" not in str(caught.value)

    nan = data.x.clone()
    nan[3] = float("nan")
    fails(DataError, "dataset: 1 of 12 examples hold NaN .* number 3", data=Labelled(nan, data.y))
    fails(DataError, "trusted: found 0 examples", trusted=Labelled(trusted.x[:0], trusted.y[:0]))
    fails(DataError, r"dataset: found targets of torch\.float64, expected labels", data=(data.x, data.x))
    fails(DataError, "trusted: found label 2, but Linear has 2 outputs", net=nn.Linear(2, 2).double(), data=blobs(2, 0))
    fails(NetError, r"trusted: MLP cannot take examples \[1\]", trusted=Labelled(trusted.x[:, :1], trusted.y))
    fails(ConfigError, "threshold: should be less than 1, found 1.5", threshold=1.5)
    fails(ConfigError, "no setting 'iteration'; did you mean 'iterations'", iteration=5)
