from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from metahpo.inner import SGD, InnerProblem, rule_hparams


@pytest.fixture
def small_problem():
    """Makes a problem of so many steps."""
    return _small_problem


def _small_problem(steps: int = 5):
    """(problem, rule, outer loss, params, hparams, batches): a two-layer net with a decay for each tensor, weighted
    examples and its rate."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, y, val_x, val_y = draw(8, 3), draw(8, 2), draw(6, 3), draw(6, 2)
    params = {"a": draw(3, 4), "b": draw(4, 2)}

    def net(params, x):
        return torch.tanh(x @ params["a"]) @ params["b"]

    def loss(params, hparams, batch):
        x, y, which = batch
        errors = (net(params, x) - y).square().mean(1)
        decay = sum(hparams["decay"][i].exp() * p.square().sum() for i, p in enumerate(params.values()))
        return (torch.sigmoid(hparams["weights"][which]) * errors).mean() + decay

    def outer_loss(params, hparams):
        return F.mse_loss(net(params, val_x), val_y) + 0.01 * hparams["decay"].square().sum()

    rule = SGD(0.1).double()
    hparams = {"decay": draw(2) - 3, "weights": draw(8), **rule_hparams(rule)}
    chosen = [torch.randperm(8, generator=generator)[:4] for _ in range(steps)]
    batches = [(x[which], y[which], which) for which in chosen]
    return InnerProblem(loss), rule, outer_loss, params, hparams, batches
