"""What the tunings say of arguments that cannot be meant, and ``RatesTuner.compare`` on batches of any kind."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metahpo.errors import ArgumentError, ConfigError, MetaHPOError
from metahpo.tuning import clean, tune_decay, tune_rates
from metahpo.tuning.rates import RatesSettings, RatesTuner

X, Y = torch.arange(24.0).view(8, 3) / 24, torch.arange(8) % 2
NOT_CALLABLE = (True, "x", 3, [1], torch.ones(2))
NOT_DEVICE = (True, "gpu9", 1.5, [1], object())
NOT_DATA = (None, True, "x", 3, torch.ones(2), object())
BAD_DATA = (
    (X[:0], Y[:0]),
    (X * math.nan, Y),
    (X * math.inf, Y),
    (X, Y - 1),
    (X, Y[:3]),
    (X, Y.float()),
    (X.to(torch.complex64), Y),
)
QUICK = {
    tune_rates: {"train_loader": [(X, Y)], "val_loader": [(X, Y)], "steps": 1, "phases": 1, "iterations": 1},
    tune_decay: {"train": (X, Y), "val": (X, Y), "steps": 1, "every": 1},
    clean: {"dataset": (X, Y), "trusted": (X, Y), "steps": 1, "iterations": 1},
}
ABUSES = [
    *[(kind, {"on_step": v}, "on_step") for kind in QUICK for v in NOT_CALLABLE],
    *[(kind, {"device": v}, "device") for kind in QUICK for v in NOT_DEVICE],
    *[(kind, {"net": v}, "net") for kind in QUICK for v in NOT_CALLABLE],
    *[(kind, {"loss": v}, "loss") for kind in (tune_rates, tune_decay) for v in (None, *NOT_CALLABLE)],
    *[(kind, {"loss": None, "forward": v}, "forward") for kind in (tune_rates, tune_decay) for v in NOT_CALLABLE],
    (clean, {"forward": lambda net, batch: net(batch)}, "takes no forward"),
    *[(tune_decay, {n: v}, n) for n in ("train", "val") for v in (*NOT_DATA, *BAD_DATA, (X, Y + 7))],
    *[(clean, {n: v}, n) for n in ("dataset", "trusted") for v in (*NOT_DATA, *BAD_DATA)],
    (clean, {"dataset": (X, Y + 7), "net": nn.Linear(3, 2)}, "found label 8"),
    *[(tune_rates, {n: v}, n) for n in ("train_loader", "val_loader") for v in (None, True, "x", 3, object())],
    *[(tune_rates, {n: [v]}, n) for n in ("train_loader", "val_loader") for v in BAD_DATA[:3]],
]


def test_every_abuse_is_answered_in_a_line_that_names_the_argument():
    wrong = []
    for function, arguments, expected in ABUSES:
        given = {"net": nn.Linear(3, 2), **QUICK[function]}
        if function is not clean:
            given["loss"] = F.cross_entropy
        try:
            function(**{**given, **arguments})
            wrong.append(f"{function.__name__} {arguments}: taken")
        except Exception as error:
            line = str(error)
            if not isinstance(error, ArgumentError) or expected not in line or len(line.splitlines()) != 1:
                wrong.append(f"{function.__name__} {arguments}: {type(error).__name__}: {line}")
    assert not wrong, f"{len(wrong)} of {len(ABUSES)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("part", ["train_loader", "val_loader"])
@pytest.mark.parametrize("labels", [Y - 1, Y + 7])
def test_labels_that_the_net_has_no_output_for_are_named_with_their_loader(part, labels):
    """By the loss itself, which may be any: the line says which loader and what the loss found."""
    given = {"net": nn.Linear(3, 2), "loss": F.cross_entropy, **QUICK[tune_rates], part: [(X, labels)]}
    with pytest.raises(MetaHPOError, match=rf"^{part}: .*Target -?\d is out of bounds"):
        tune_rates(**given)


def test_a_tuning_by_forward_is_compared_on_a_batch_as_its_loaders_give_them():
    settings = RatesSettings(steps=2, phases=1, iterations=1)
    named = [{"x": X, "y": Y}]

    def forward(net, batch):
        return F.cross_entropy(net(batch["x"]), batch["y"])

    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    by_forward = RatesTuner(net, None, named, named, settings, forward=forward)
    by_loss = RatesTuner(net, F.cross_entropy, [(X, Y)], [(X, Y)], settings)
    found, expected = by_forward.compare(named[0]), by_loss.compare(X, Y)
    assert {name: row["loss"] for name, row in found.items()} == pytest.approx(
        {name: row["loss"] for name, row in expected.items()}, rel=1e-6
    )
    with pytest.raises(ConfigError, match="compare: found no y"):
        by_loss.compare(X)
