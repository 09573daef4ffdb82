"""Examples of whole numbers, as an embedding takes them."""

import torch
from torch import nn

from metahpo.tuning import clean, tune_decay


def tokens():
    torch.manual_seed(0)
    x = torch.randint(7, (12, 3))
    net = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 2))
    return net, x, x[:, 0] % 2


def test_decays_and_weights_of_examples_are_learnt_on_token_ids():
    net, x, y = tokens()
    loss = nn.functional.cross_entropy
    decay = tune_decay(net, loss, (x, y), (x, y), steps=2, every=1, batch=4, terms=1)
    assert decay.net(x).shape == (12, 2)
    assert len(clean((x, y), (x[:4], y[:4]), net=net, iterations=1, steps=2).weights) == 12
