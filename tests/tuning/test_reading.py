"""How tunings read loaders and data sets: memory used again, random augmentation, loaders that skip or draw."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, Subset, TensorDataset

from metahpo.errors import DataError
from metahpo.tuning import clean, tune_rates
from metahpo.tuning.cleaning import CleaningTuner
from metahpo.tuning.data import Examples, labelled, read_once

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(30) % 3
SETTINGS = {"iterations": 1, "steps": 2}


class Noisy(Dataset):
    def __len__(self):
        return 30

    def __getitem__(self, i):
        return X[i] + 0.1 * torch.randn(4), Y[i]


class Again:
    """Batches in one piece of memory."""

    def __iter__(self):
        x, y = torch.empty(10, 4), torch.empty(10, dtype=torch.long)
        for first in range(0, 30, 10):
            x[:], y[:] = X[first : first + 10], Y[first : first + 10]
            yield x, y


def test_rates_are_those_of_a_loader_that_does_not_use_its_memory_again():
    found = []
    for loader in ([(X[i : i + 10], Y[i : i + 10]) for i in (0, 10, 20)], Again()):
        torch.manual_seed(0)
        net = nn.Linear(4, 3)
        settings = {"steps": 3, "iterations": 2, "phases": 1, "fresh": False}
        found.append(tune_rates(net, F.cross_entropy, loader, loader, **settings).history)
    assert found[0] == found[1]


def test_a_loss_that_writes_into_its_targets_does_no_harm():
    def writes(outputs, targets):
        return F.cross_entropy(outputs, targets.add_(1).remainder_(3))

    found, data = [], [(X.clone(), Y.clone())]
    for loss in (lambda outputs, targets: F.cross_entropy(outputs, (targets + 1) % 3), writes):
        torch.manual_seed(0)
        settings = {"steps": 3, "iterations": 2, "phases": 1, "fresh": False}
        found.append(tune_rates(nn.Linear(4, 3), loss, data, data, **settings).history)
    assert found[0] == found[1]
    assert torch.equal(data[0][1], Y)


def test_random_augmentation_is_read_by_the_seed_and_said():
    reads = []
    for state in (1, 2):
        torch.manual_seed(state)
        with pytest.warns(UserWarning, match=r"dataset: example 0 is another when it is read again"):
            reads.append(read_once(Noisy(), "dataset", labelled, 5).x)
    assert torch.equal(*reads) and not torch.equal(reads[0], X)
    with pytest.warns(UserWarning, match="train: example 0"):
        tree = read_once(DataLoader(Noisy(), 10), "train", Examples, 5).tree
    assert not torch.equal(tree[0], X)


@pytest.mark.filterwarnings("error")
def test_what_does_not_draw_is_read_without_a_word():
    data = TensorDataset(X, Y)
    assert torch.equal(read_once(DataLoader(Subset(data, range(30)), 7), "dataset", labelled, 0).x, X)


class Skips(DataLoader):
    def __iter__(self):
        return (batch for i, batch in enumerate(super().__iter__()) if i)


DATA = TensorDataset(X, Y)
SKIPPING = {
    "batches of its own": DataLoader(DATA, batch_sampler=[[1, 0], [2]]),
    "all, in another order": DataLoader(DATA, batch_sampler=[list(range(15, 30)), list(range(15))]),
    "a sampler of some": DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(range(20)), 10, False)),
    "a last batch dropped": DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 7, True)),
    "shuffled": DataLoader(DATA, 10, shuffle=True),
    "a list of places": DataLoader(DATA, 10, sampler=list(range(29, -1, -1))),
    "examples left out": DataLoader(DATA, 10, collate_fn=lambda rows: tuple(map(torch.stack, zip(*rows[1:])))),
    "a loader of its own kind": Skips(DATA, 10),
}


@pytest.mark.parametrize("loader", SKIPPING)
def test_a_loader_whose_examples_have_no_numbers_is_refused(loader):
    with pytest.raises(DataError, match="shuffles, draws or leaves examples out"):
        clean(SKIPPING[loader], (X, Y), **SETTINGS)


def test_loaders_in_order_give_the_weights_of_their_data():
    batches = BatchSampler(SequentialSampler(DATA), 7, False)
    loaders = DataLoader(DATA, 7), DataLoader(DATA, batch_sampler=batches), DataLoader(DATA, 7, sampler=range(30))
    for loader in loaders:
        assert torch.equal(CleaningTuner(loader, (X, Y)).data.x, X)
