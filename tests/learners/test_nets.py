"""Nets that nobody designed MAML for: trained a little by each engine, and the engines' gradients compared."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metahpo.errors import NetError
from metahpo.learners import MAML, MAMLPlusPlus, Phase
from metahpo.tasks import Task
from metahpo.training.engines import Loop, VMap

WAYS, LENGTH, WIDTH = 3, 5, 8


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.short, self.head = nn.Conv2d(1, 4, 1), nn.Linear(4, WAYS)

    def forward(self, x):
        x = x.unflatten(-1, (1, WIDTH))
        x = x.transpose(1, 2)
        y = self.bn2(self.second(torch.tanh(self.bn1(self.first(x)))))
        return self.head(torch.tanh(y + self.short(x)).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(WIDTH, 6, batch_first=True), nn.Linear(6, WAYS)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Transformer(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout, batch_first=True, activation="gelu")
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(WIDTH, WAYS)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class FusedAttention(nn.Module):
    """Calls scaled_dot_product_attention itself, whose fast kernels have no second derivative."""

    def __init__(self):
        super().__init__()
        self.qkv, self.norm, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WAYS)

    def forward(self, x):
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return self.head(self.norm(F.scaled_dot_product_attention(q, k, v).squeeze(1)).mean(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WAYS)
        self.again.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.tanh(self.again(torch.tanh(self.first(x)))).mean(1))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.never = nn.Linear(WIDTH, WAYS), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(x.mean(1))


def flat(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(LENGTH * WIDTH, 6), *layers, nn.Tanh(), nn.Linear(6, WAYS))


def frozen() -> nn.Module:
    net = flat(nn.BatchNorm1d(6))
    for param in net[1].parameters():
        param.requires_grad_(False)
    return net


def convolutional(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv1d(LENGTH, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(4 * (WIDTH - 2), WAYS))


NETS = {
    "residual": Residual,
    "lstm": Recurrent,
    "transformer": Transformer,
    "fused_attention": FusedAttention,
    "tied": Tied,
    "frozen": frozen,
    "batch_norm_1d": lambda: flat(nn.BatchNorm1d(6)),
    "no_norm": flat,
    "unused": Unused,
    "dropout": lambda: flat(nn.Dropout(0.5)),
    "transformer_dropout": lambda: Transformer(0.3),
    "layer_norm": lambda: flat(nn.LayerNorm(6)),
    "group_norm": lambda: convolutional(nn.GroupNorm(2, 4)),
    "instance_norm": lambda: convolutional(nn.InstanceNorm1d(4, affine=True)),
}
RANDOM = {"dropout", "transformer_dropout"}


def tasks(count: int = 4) -> Task:
    """Sequences [T, N, LENGTH, WIDTH] whose class shows in their mean."""
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(WAYS).repeat(count, 4)
    means = torch.randn(count, WAYS, 1, WIDTH, generator=generator)
    x = torch.randn(count, 4 * WAYS, LENGTH, WIDTH, generator=generator)
    x = x + means[torch.arange(count)[:, None], y]
    return Task(x[:, : 2 * WAYS], y[:, : 2 * WAYS], x[:, 2 * WAYS :], y[:, 2 * WAYS :])


def build(name: str, kind: type[MAML] = MAMLPlusPlus, **options) -> MAML:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(NETS[name](), steps=2, **options)


@pytest.mark.parametrize("name", sorted(set(NETS) - RANDOM - {"lstm"}))
def test_engines_agree(name):
    learner, batch = build(name).double(), tasks().to(torch.float64)
    batch = batch._replace(support_y=batch.support_y.long(), query_y=batch.query_y.long())
    phase = learner.training_phase(0)
    loop, vmap = (engine.meta_gradient(learner, batch, phase) for engine in (Loop(), VMap()))
    torch.testing.assert_close(loop.losses, vmap.losses, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loop.grads, vmap.grads, rtol=1e-10, atol=1e-10)


def test_vmap_runs_a_recurrent_net_or_says_that_it_cannot():
    learner = build("lstm")
    phase = learner.training_phase(0)
    loop, vmap = (engine.meta_gradient(learner, tasks(), phase) for engine in (Loop(), VMap()))
    torch.testing.assert_close(loop.grads, vmap.grads, rtol=1e-4, atol=1e-5)
    # torch's float64 kernel writes in place where vmap has no rule for it.
    batch = tasks().to(torch.float64)
    batch = batch._replace(support_y=batch.support_y.long(), query_y=batch.query_y.long())
    with pytest.raises(
        NetError, match=r"engine vmap cannot run module .lstm. \(LSTM\) .*; choose engine threads or loop"
    ):
        VMap().meta_gradient(learner.double(), batch, phase)


@pytest.mark.parametrize("name", sorted(set(NETS) - RANDOM))
def test_gradient_along_a_random_direction_equals_a_difference(name):
    learner, batch = build(name, MAML, adapt_norms=True).double(), tasks(2).to(torch.float64)
    batch = batch._replace(support_y=batch.support_y.long(), query_y=batch.query_y.long())
    phase = learner.training_phase(0)
    grads = Loop().meta_gradient(learner, batch, phase).grads
    directions = {n: torch.randn_like(p) for n, p in learner.outer_params().items()}
    slope = sum((grads[n] * d).sum() for n, d in directions.items())
    values = []
    for sign in (1, -1):
        moved = copy.deepcopy(learner)
        with torch.no_grad():
            for n, p in moved.outer_params().items():
                p.add_(directions[n], alpha=sign * 1e-6)
        values.append(Loop().meta_gradient(moved, batch, phase).loss)
    torch.testing.assert_close((values[0] - values[1]) / 2e-6, slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "engine"), [*((name, Loop()) for name in sorted(NETS)), *((name, VMap()) for name in sorted(RANDOM))]
)
def test_learns(name, engine):
    learner, batch = build(name), tasks()
    optimizer = torch.optim.Adam(learner.outer_params().values(), lr=0.03)
    phase, losses = Phase(training=True), []
    for _ in range(12):
        with torch.random.fork_rng():
            torch.manual_seed(len(losses))
            result = engine.meta_gradient(learner, batch, phase)
        for parameter, grad in zip(learner.outer_params().values(), result.grads.values()):
            parameter.grad = grad
        optimizer.step()
        learner.update_buffers(result.metrics["buffers"])
        losses.append(result.loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_frozen_parameters_stay():
    learner = build("frozen")
    names = set(Loop().meta_gradient(learner, tasks(), learner.training_phase(0)).grads)
    assert "module.net.1.weight" not in names
    assert "module.net.4.weight" in names


def test_unused_parameters_have_zero_gradients():
    learner = build("unused")
    grads = Loop().meta_gradient(learner, tasks(), learner.training_phase(0)).grads
    assert torch.count_nonzero(grads["module.net.never.weight"]) == 0


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_dropout_follows_the_seed_in_training_and_is_off_in_evaluation(name):
    learner, batch = build(name), tasks()

    def loss(seed: int, phase: Phase) -> float:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return learner.meta_loss(batch.select(0), phase)[0].item()

    assert loss(0, Phase(training=True)) == loss(0, Phase(training=True)) != loss(1, Phase(training=True))
    assert loss(0, Phase()) == loss(1, Phase())


def test_an_all_frozen_net_is_refused():
    with pytest.raises(NetError, match="no parameter to adapt"):
        MAML(nn.Linear(2, 2).requires_grad_(False))
