from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from metahpo.functional.formulas import ByFormula
from metahpo.hypergrad import Unroll
from metahpo.inner import SGD, InnerProblem
from metahpo.learners import MAML, Phase
from metahpo.tasks import Task
from metahpo.training.engines import Loop, Threads, VMap

WORDS = torch.tensor([[0, 1, 4, 2], [2, 0, 3, 3], [1, 1, 2, 4]])
NUMBERS = torch.arange(18.0, dtype=torch.float64).sin().view(3, 6)
Y = torch.tensor([0, 1, 2])


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


NETS = {
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 3)), nn.Tanh()),
    "weight norm over all": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 3), dim=None), nn.Tanh()),
    "hardsigmoid": lambda: nn.Sequential(nn.Linear(6, 3), nn.Hardsigmoid(), nn.Linear(3, 3), nn.Tanh()),
    "bag": lambda: nn.Sequential(nn.EmbeddingBag(5, 3), nn.Tanh(), nn.Linear(3, 3)),
    "sparse": lambda: nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Tanh(), nn.Linear(12, 3)),
}


def inputs(name: str) -> torch.Tensor:
    return WORDS if name in ("bag", "sparse") else NUMBERS


def learner_of(net: nn.Module) -> MAML:
    return MAML(net.double(), steps=2, inner_lr=0.5).double()


def along(learner: MAML, tasks: Task, size: float) -> float:
    """The mean meta-loss at a step of ``size`` along a fixed direction; its slope is checked against the gradient."""
    moved = {n: (p.detach() + size * direction(n, p)).requires_grad_() for n, p in learner.outer_params().items()}
    losses = [
        functional_call(learner, moved, (tasks.select(i), Phase(training=True)))[0] for i in range(len(tasks.query_x))
    ]
    return float(torch.stack(losses).mean())


def direction(name: str, like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(like.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", NETS)
def test_meta_gradients_are_the_slope_of_the_loss_in_every_engine(name):
    torch.manual_seed(0)
    learner, x = learner_of(NETS[name]()), inputs(name)
    tasks = Task(*(torch.stack([t, t.flip(0)]) for t in (x, Y, x.roll(1, 1), Y)))
    slope = (along(learner, tasks, 1e-5) - along(learner, tasks, -1e-5)) / 2e-5
    for engine in (Loop(), Threads(), VMap()):
        grads = engine.meta_gradient(learner, tasks, Phase(training=True)).grads
        found = sum(float((g * direction(n, g)).sum()) for n, g in grads.items())
        assert found == pytest.approx(slope, rel=1e-6, abs=1e-8), engine.name


@pytest.mark.parametrize("make", [parametrizations.weight_norm, old_weight_norm])
def test_unroll_differentiates_weight_norm_in_a_loss_of_ones_own(make):
    torch.manual_seed(0)
    net = make(nn.Linear(6, 3)).double()
    params = {name: p.detach() for name, p in net.named_parameters()}

    def inner(params, hparams, batch):
        return F.cross_entropy(functional_call(net, params, batch), Y) * hparams["scale"]

    def outer(params, hparams):
        return F.cross_entropy(functional_call(net, params, NUMBERS.roll(1, 1)), Y.flip(0))

    def result(scale):
        hparams = {"scale": torch.tensor(scale, dtype=torch.float64)}
        return Unroll()(InnerProblem(inner), SGD(0.5), outer, params, hparams, [NUMBERS] * 3)

    slope = (result(1 + 1e-5).value - result(1 - 1e-5).value) / 2e-5
    torch.testing.assert_close(result(1.0).grads["scale"], slope, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 1, -2])
@pytest.mark.parametrize("kind", ["rows", "offsets", "last offset"])
def test_bags_are_torchs_in_value_and_gradient(mode, padding, kind):
    torch.manual_seed(0)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    offsets = {"rows": None, "offsets": [0, 2, 2, 5], "last offset": [0, 2, 2, 5, 12]}[kind]
    words = WORDS if offsets is None else WORDS.flatten()
    options = {
        "mode": mode,
        "padding_idx": padding,
        "include_last_offset": kind == "last offset",
        "offsets": None if offsets is None else torch.tensor(offsets),
        "per_sample_weights": torch.rand(words.shape, dtype=torch.float64) if mode == "sum" else None,
    }
    wanted = F.embedding_bag(words, weight, **options)
    with ByFormula() as formulas:
        found = F.embedding_bag(words, weight, **options)
    assert formulas.used
    torch.testing.assert_close(found, wanted)
    slopes = [torch.autograd.grad(out.sin().sum(), weight)[0] for out in (found, wanted)]
    torch.testing.assert_close(*slopes)
