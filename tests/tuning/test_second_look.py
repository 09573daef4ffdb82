"""The second look at labels: its probabilities, its folds, what it decides."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metahpo.errors import NonFiniteError
from metahpo.tuning.data import Labelled
from metahpo.tuning.second_look import FAINT, FOLDS, IMAGINED, SecondLook, label_posterior, second_look


def test_the_posterior_is_a_fixed_point_of_bayes_rule_and_of_the_rates_it_implies():
    """Both sides written out here, an example and a pair of classes at a time."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(40, 3, generator=generator, dtype=torch.float64).mul(3).softmax(1)
    y = torch.where(torch.arange(40) % 4 == 0, (p.argmax(1) + 1) % 3, p.argmax(1))
    found = label_posterior(p, y).tolist()
    written = [[0.0] * 3 for _ in range(3)]
    for row, label in zip(found, y.tolist()):
        for right in range(3):
            written[right][label] += row[right]
    rate = 1 - sum(written[c][c] for c in range(3)) / 40
    rates = [
        [
            (written[c][d] + IMAGINED * (1 - rate if c == d else rate / 2))
            / (sum(written[c]) + IMAGINED)
            for d in range(3)
        ]
        for c in range(3)
    ]
    for i, label in enumerate(y.tolist()):
        parts = [float(p[i, c]) * rates[c][label] for c in range(3)]
        assert found[i] == pytest.approx([part / sum(parts) for part in parts], abs=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
def test_the_posterior_recovers_the_share_of_wrong_labels(share):
    """From the true probabilities, with labels drawn from the model itself."""
    generator = torch.Generator().manual_seed(1)
    count = 4000
    p = torch.randn(count, 4, generator=generator, dtype=torch.float64).mul(6).softmax(1)
    right = torch.multinomial(p, 1, generator=generator)[:, 0]
    wrong = torch.rand(count, generator=generator) < share
    shift = torch.randint(1, 4, (count,), generator=generator)
    y = torch.where(wrong, (right + shift) % 4, right)
    probability = label_posterior(p, y)[torch.arange(count), y]
    # Five standard deviations of the drawn share, and what the uncertain examples leave open.
    assert float(1 - probability.mean()) == pytest.approx(share, abs=5 * 0.5 / math.sqrt(count))


def test_no_net_has_seen_the_examples_that_it_is_asked_about():
    data = Labelled(torch.arange(23.0)[:, None], torch.arange(23) % 3)
    trusted = Labelled(100 + torch.arange(11.0)[:, None], torch.arange(11) % 3)
    trained, asked, least = [], [], []

    def train(examples, weights, number):
        trained.append((number, set(examples.x[:, 0].tolist())))
        least.append(float(weights.min()))
        asked.append(set())
        assert len(weights) == len(examples.x)

        def net(x):
            asked[-1].update(x[:, 0].tolist())
            return torch.zeros(len(x), 3)

        return net

    second_look(data, trusted, torch.full((23,), 0.5), 0.99, train)
    everyone = {*data.x[:, 0].tolist(), *trusted.x[:, 0].tolist()}
    for (_, seen), unseen in zip(trained, asked):
        assert not seen & unseen
        assert seen | unseen == everyone
    for first in range(0, len(asked), FOLDS):
        assert set(itertools.chain(*asked[first : first + FOLDS])) == everyone
    # In the first round the second nets learn from the trusted ones.
    assert least[:FOLDS] == [0.5] * FOLDS
    assert least[FOLDS : 2 * FOLDS] == pytest.approx([FAINT] * FOLDS)
    # The two trainings that are compared draw the same.
    numbers = [number for number, _ in trained]
    assert numbers[-FOLDS:] == numbers[-2 * FOLDS : -FOLDS]


def test_one_example_of_each_and_one_class_are_no_trouble():
    net = nn.Linear(1, 1)
    look = second_look(
        Labelled(torch.ones(1, 1), torch.zeros(1, dtype=torch.long)),
        Labelled(torch.ones(1, 1), torch.zeros(1, dtype=torch.long)),
        torch.ones(1),
        0.5,
        lambda examples, weights, number: torch.no_grad()(net),
    )
    assert look.right.tolist() == [1.0]
    assert not look.worthwhile


def test_outputs_that_are_not_finite_are_said():
    data = Labelled(torch.ones(6, 1), torch.arange(6) % 2)
    with pytest.raises(NonFiniteError, match=r"outputs are not finite .* smaller lr"):
        second_look(data, data, torch.ones(6), 0.5, lambda *_: lambda x: torch.full((len(x), 2), math.nan))


def test_the_gain_does_not_depend_on_how_sure_the_nets_are():
    """Nets of which those that learn from all examples, wrong ones too, miss more of the trusted ones."""
    generator = torch.Generator().manual_seed(2)
    right = torch.arange(30) % 3
    data = Labelled(right.double()[:, None], torch.where(torch.arange(30) < 6, (right + 1) % 3, right))
    trusted = Labelled(right.double()[:, None], right)
    blur = torch.randn(30, 3, generator=generator, dtype=torch.float64)

    def look(sure):
        def train(examples, weights, number):
            noise = 1.5 if float(weights.min()) == 1 and len(weights) == 48 else 0.4

            def net(x):
                return sure * (F.one_hot(x[:, 0].long(), 3) + noise * blur[: len(x)])

            return net

        return second_look(data, trusted, torch.ones(30).double(), 0.5, train)

    plain, sure = look(1.0), look(10**0.2)
    assert plain.gain > 0.1
    assert (sure.gain, sure.error) == pytest.approx((plain.gain, plain.error), rel=1e-6)


@pytest.mark.parametrize(("gain", "worthwhile"), [(0.3, True), (-0.1, True), (-0.3, False)])
def test_trusted_examples_have_to_speak_against_it(gain, worthwhile):
    assert SecondLook(torch.ones(1), torch.zeros(1), gain, 0.2).worthwhile is worthwhile
