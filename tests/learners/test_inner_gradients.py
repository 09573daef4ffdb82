"""MAML++ by every inner gradient and rematerialisation, on nets that nobody designed them for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metahpo.errors import NetError
from metahpo.inner import Every, Mixed, NoRemat, Reverse, Sqrt
from metahpo.learners import MAMLPlusPlus, Phase
from metahpo.tasks import Task
from metahpo.training.engines import Loop, VMap

LENGTH, WIDTH, WAYS = 5, 8, 3
WAYS_THROUGH = [(Mixed(), NoRemat()), (Mixed(), Sqrt()), (Mixed("dual"), Every(1)), (Reverse(), Every(2))]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(WIDTH, 4, batch_first=True), nn.Linear(4, WAYS)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Transformer(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(WIDTH, WAYS)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


def convolutional(norm: nn.Module, *more: nn.Module) -> nn.Module:
    layers = [nn.Conv1d(LENGTH, 4, 3), norm, nn.Tanh(), *more, nn.Flatten(), nn.LazyLinear(WAYS)]
    net = nn.Sequential(*layers)
    net(torch.zeros(2, LENGTH, WIDTH))
    return net


NETS = {
    "batch_norm": lambda: convolutional(nn.BatchNorm1d(4)),
    "group_norm": lambda: convolutional(nn.GroupNorm(2, 4)),
    "max_pool": lambda: convolutional(nn.InstanceNorm1d(4, affine=True), nn.MaxPool1d(2)),
    "dropout": lambda: convolutional(nn.BatchNorm1d(4), nn.Dropout(0.5)),
    "transformer": Transformer,
    "lstm": Recurrent,
}


def tasks() -> Task:
    x, y = torch.randn(2, 12, LENGTH, WIDTH, dtype=torch.float64), torch.arange(WAYS).repeat(2, 4)
    return Task(x[:, :6], y[:, :6], x[:, 6:], y[:, 6:])


def meta_gradient(name, engine, gradient, remat, phase=None, seed=1):
    torch.manual_seed(0)
    learner = MAMLPlusPlus(NETS[name](), steps=3, gradient=gradient, remat=remat).double()
    batch = tasks()
    torch.manual_seed(seed)
    return engine.meta_gradient(learner, batch, phase or learner.training_phase(1))


@pytest.mark.parametrize("engine", [Loop(), VMap()])
@pytest.mark.parametrize("name", NETS)
def test_all_give_the_gradient_of_reverse_mode(name, engine):
    if name == "lstm" and engine.name == "vmap":
        pytest.skip("engine vmap does not run float64 LSTMs")
    last_step_alone = Phase(training=True)
    # The layers inside a step know nothing of how steps are weighted: two nets show that.
    for phase in (None, last_step_alone) if name in ("batch_norm", "dropout") else (None,):
        expected = meta_gradient(name, engine, Reverse(), NoRemat(), phase)
        for gradient, remat in WAYS_THROUGH:
            if gradient == Mixed("dual") and engine.name == "vmap":
                with pytest.raises(NetError, match=r"does not run under torch.func \(engine vmap\)"):
                    meta_gradient(name, engine, gradient, remat, phase)
                continue
            found = meta_gradient(name, engine, gradient, remat, phase)
            torch.testing.assert_close(found.grads, expected.grads, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(found.losses, expected.losses, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found.metrics, expected.metrics, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", [Loop(), VMap()])
def test_first_order_needs_neither(engine):
    phase = Phase(training=True, first_order=True)
    expected = meta_gradient("batch_norm", engine, Reverse(), NoRemat(), phase)
    found = meta_gradient("batch_norm", engine, Mixed("dual"), Sqrt(), phase)
    torch.testing.assert_close(found.grads, expected.grads, rtol=0, atol=0)


@pytest.mark.parametrize("remat", [NoRemat(), Sqrt()])
def test_a_loss_with_parameters_of_its_own_is_refused(remat):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(WAYS, dtype=torch.float64))
    loss = lambda outputs, y: nn.functional.cross_entropy(outputs * weight, y)  # noqa: E731
    learner = MAMLPlusPlus(NETS["batch_norm"](), steps=2, loss=loss, gradient=Mixed(), remat=remat).double()
    with pytest.raises(NetError, match=r"the inner loss computes \(mul\) with a tensor \[3\]"):
        Loop().meta_gradient(learner, tasks(), learner.training_phase(0))
