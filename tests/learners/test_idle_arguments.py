"""Arguments that would have no effect are refused."""

from __future__ import annotations

import pytest
from torch import nn

from metahpo.errors import NetArgumentError
from metahpo.inner import SGD
from metahpo.learners import ANIL, BOIL, CAVIA, IMAML, MAML, Improvements, MetaCurvature, MetaSGD, PolicyMAML, Reptile
from metahpo.learners import WarpMAML as Warp
from metahpo.rl import Navigation

RULE, RATES = SGD(0.1), Improvements(layer_step_rates=True)


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        (MetaSGD, {"rule": RULE}, "rule: the learner has a rule of its own"),
        (MetaCurvature, {"rule": RULE}, "rule: the learner has a rule of its own"),
        *[
            (kind, {"rule": RULE, "inner_lr": 0.1}, "inner_lr: rule has rates of its own")
            for kind in (MAML, ANIL, BOIL, CAVIA, Warp, IMAML, Reptile)
        ],
        (MAML, {"rule": RULE, "learn_lr": True}, "learn_lr: rule has rates of its own"),
        (MAML, {"rule": RULE, "improvements": RATES}, "rule: layer_step_rates is itself an update rule"),
        (MAML, {"learn_lr": True, "improvements": RATES}, "learn_lr: layer_step_rates learns a rate for each step"),
        (
            MAML,
            {"first_order": True, "improvements": Improvements(first_order_epochs=2)},
            "first_order: it holds for all epochs",
        ),
        (CAVIA, {"adapt_norms": True}, "adapt_norms: the context alone is adapted"),
        (ANIL, {"adapt_norms": True}, "adapt_norms: the head alone is adapted"),
    ],
)
def test_arguments_without_effect_are_refused(kind, options, named):
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    with pytest.raises(NetArgumentError, match=f"{kind.__name__}: {named}") as error:
        kind(net, **options)
    assert "\n" not in str(error.value)


def test_arguments_of_policies_without_effect_are_refused():
    net = nn.Linear(2, 2)
    with pytest.raises(NetArgumentError, match="PolicyMAML: inner_lr: rule has rates of its own"):
        PolicyMAML(net, Navigation(), rule=RULE, inner_lr=0.1)
    with pytest.raises(NetArgumentError, match="PolicyMAML: learn_lr: layer_step_rates learns"):
        PolicyMAML(net, Navigation(), learn_lr=True, layer_step_rates=True)


def test_a_rule_alone_is_used():
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    for kind in (MAML, ANIL, BOIL, CAVIA, Warp, IMAML, Reptile):
        assert kind(net, rule=RULE).rule is RULE
