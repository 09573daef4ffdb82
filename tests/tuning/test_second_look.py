"""The second look at labels: its probabilities, its folds, what it decides."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from metahpo.errors import NonFiniteError
from metahpo.tuning.data import Labelled
from metahpo.tuning.second_look import FOLDS, IMAGINED, label_posterior, second_look


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
    trained, asked = [], []

    def train(examples, weights, number):
        trained.append((number, set(examples.x[:, 0].tolist())))
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
