"""Six kinds of normalisation in every tuning and hypergradient strategy, against plain PyTorch loops."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import TensorDataset

from metahpo.functional import FunctionalModule
from metahpo.hypergrad import CG, PES, FiniteDifference, FixedPoint, Forward, Implicit, Unroll
from metahpo.inner import SGD, Every, InnerProblem, Mixed, rule_hparams
from metahpo.searchers.hypergradient_objective import HypergradientObjective
from metahpo.tuning.cleaning import CleaningTuner
from metahpo.tuning.decay import DecayTuner
from metahpo.tuning.distillation import DistillationSettings, DistillationTuner
from metahpo.tuning.rates import RatesSettings, RatesTuner
from metahpo.tuning.settings import CleaningSettings, DecaySettings

STEPS, RATE, MOMENTUM, DECAY = 3, 0.25, 0.5, 0.125


class OwnForward(nn.BatchNorm2d):
    """With a forward method of its own that calls ``F.batch_norm``, as timm's BatchNormAct2d."""

    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        statistics = (self.running_mean, self.running_var)
        out = F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)
        return torch.tanh(out)


class Centred(nn.Module):
    """A normaliser of one's own, which writes into its running mean before it subtracts that."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_buffer("mean", torch.zeros(channels))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.75).add_(0.25 * x.mean((0, 2, 3)))
        return (x - self.mean.clone()[:, None, None]) * self.weight[:, None, None]


KINDS = {
    "own forward": lambda: OwnForward(2),
    "sync": lambda: nn.SyncBatchNorm(2),
    "instance": lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
    "no statistics": lambda: nn.BatchNorm2d(2, track_running_stats=False),
    "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 2, 1)),
    "one's own": lambda: Centred(2),
}


def net_with(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 2, 3, padding=1), KINDS[kind](), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(8, 3)).double()


def examples(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(6, 1, 4, 4, generator=generator, dtype=torch.float64) + 1, torch.arange(6) % 3


BATCHES, VAL = [examples(seed) for seed in range(STEPS)], examples(9)


def outputs_of(net: nn.Module, x: Tensor) -> Tensor:
    """The outputs in evaluation mode, batch norm by the batch, without a trace in the net."""
    net = copy.deepcopy(net).eval()
    for module in net.modules():
        module.training = isinstance(module, _BatchNorm)
    return net(x)


def trained(net: nn.Module, batches, momentum: float = MOMENTUM, decay: float = DECAY) -> nn.Module:
    net = copy.deepcopy(net).train()
    optimizer = torch.optim.SGD(net.parameters(), RATE, momentum, weight_decay=decay)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def loss_of(net: nn.Module) -> float:
    return F.cross_entropy(outputs_of(net, VAL[0]), VAL[1]).item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_rates_are_tuned_for_the_training_that_torch_does(kind):
    net = net_with(kind)
    settings = RatesSettings(
        steps=STEPS, phases=1, fresh=False, lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, iterations=1
    )
    found = RatesTuner(net, F.cross_entropy, BATCHES, [VAL], settings).step()["val_loss"]
    assert found == pytest.approx(loss_of(trained(net, BATCHES)), abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cleaning_trains_as_torch_does(kind):
    net = net_with(kind)
    settings = CleaningSettings(steps=STEPS, batch=None, fresh=False, lr=RATE, momentum=MOMENTUM, iterations=1)
    tuner = CleaningTuner(BATCHES[0], VAL, net, settings)
    found = tuner.step()["val_loss"]
    assert found == pytest.approx(loss_of(trained(net, BATCHES[:1] * STEPS, decay=0.0)), abs=1e-6)
    both = tuple(torch.cat(parts) for parts in zip(BATCHES[0], VAL))
    wanted = trained(net, [both] * 5 * STEPS, decay=0.0).eval()(VAL[0])
    torch.testing.assert_close(tuner.trained(tuner.data)(VAL[0]), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decay_is_tuned_along_the_training_that_torch_does(kind):
    net = net_with(kind)
    settings = DecaySettings(
        steps=STEPS, every=STEPS, batch=6, val_batch=6, lr=RATE, optimizer="sgd", momentum=MOMENTUM, decay=DECAY
    )
    tuner = DecayTuner(net, F.cross_entropy, BATCHES[0], VAL, settings)
    wanted = trained(net, BATCHES[:1] * STEPS)
    assert tuner.step()["val_loss"] == pytest.approx(loss_of(wanted), abs=1e-7)
    torch.testing.assert_close(tuner.result().net(VAL[0]), wanted.eval()(VAL[0]), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_distilled_images_train_a_net_in_evaluation_mode_as_torch_does(kind):
    net = net_with(kind)
    settings = DistillationSettings(images_per_class=1, steps=2, epochs=1, init="fixed", iterations=1)
    tuner = DistillationTuner(TensorDataset(*VAL), net, settings)
    found = tuner.run()
    plain = copy.deepcopy(net).eval()
    for which, rate in zip(found.batches, found.rates):
        grads = torch.autograd.grad(
            F.cross_entropy(plain(found.images[which]), found.labels[which]), list(plain.parameters())
        )
        with torch.no_grad():
            for p, grad in zip(plain.parameters(), grads):
                p -= rate * grad
    torch.testing.assert_close(found.train()(VAL[0]), plain(VAL[0]), rtol=1e-9, atol=1e-9)


def problem_of(net: nn.Module):
    """(inner problem, outer loss, params) with the net's buffers as the carry."""
    module = FunctionalModule(net)

    def loss(params, hparams, batch, buffers):
        outputs, buffers = module.apply_with(params, buffers, batch[0])
        squares = torch.stack([p.square().sum() for p in params.values()]).sum()
        return F.cross_entropy(outputs, batch[1]) + hparams["decay"] * squares, buffers

    def outer(params, hparams, buffers):
        return F.cross_entropy(module.apply_with(params, buffers, VAL[0], training=False)[0], VAL[1])

    params = {name: p.detach() for name, p in module.params().items()}
    return InnerProblem(loss, module.buffers_by_name()), outer, params


def unrolled(net: nn.Module, decay: Tensor, rate: Tensor, cut: int = 0) -> tuple[Tensor, nn.Module]:
    """The outer loss after plain steps, of which the first ``cut`` are constants, and the net with its buffers."""
    twin = copy.deepcopy(net).train()
    params = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    for step, (x, y) in enumerate(BATCHES):
        if step <= cut:
            params = {name: p.detach().requires_grad_() for name, p in params.items()}
        squares = torch.stack([p.square().sum() for p in params.values()]).sum()
        value = F.cross_entropy(functional_call(twin, params, x), y) + decay * squares
        grads = torch.autograd.grad(value, list(params.values()), create_graph=True)
        params = {name: p - rate * g for (name, p), g in zip(params.items(), grads)}
    ended = copy.deepcopy(twin)
    for module in twin.modules():
        module.training = isinstance(module, _BatchNorm)
    value = F.cross_entropy(functional_call(twin, params, VAL[0]), VAL[1])
    ended.load_state_dict({name: p.detach() for name, p in params.items()}, strict=False)
    return value, ended


def hyperparameters() -> dict[str, Tensor]:
    return {"decay": torch.tensor(DECAY, dtype=torch.float64), **rule_hparams(SGD(RATE).double())}


@pytest.mark.parametrize("kind", KINDS)
def test_strategies_through_the_training_give_the_gradient_of_a_plain_loop(kind):
    net, hparams = net_with(kind), hyperparameters()
    problem, outer, params = problem_of(net)
    for strategy, cut in (
        (Unroll(), 0),
        (Unroll(Mixed(), Every(2)), 0),
        (Forward(1), 0),
        (Unroll(truncate=1), STEPS - 1),
        (FiniteDifference(1e-4), STEPS - 1),
    ):
        given = {name: h.clone().requires_grad_() for name, h in hparams.items()}
        value, ended = unrolled(net, *given.values(), cut)
        grads = torch.autograd.grad(value, list(given.values()))
        found = strategy(problem, SGD(RATE).double(), outer, params, hparams, BATCHES)
        assert found.value.item() == pytest.approx(value.item(), abs=1e-12)
        close = 1e-6 if isinstance(strategy, FiniteDifference) else 1e-9
        torch.testing.assert_close(list(found.grads.values()), list(grads), rtol=close, atol=close)
        left = {name: b for name, b in ended.named_buffers() if name in found.state.carry}
        for name, b in left.items():
            torch.testing.assert_close(found.state.carry[name].view_as(b), b, rtol=1e-9, atol=1e-12)
        # It goes on from there as the plain loop does.
        again = strategy(problem, SGD(RATE).double(), outer, found.final_params, hparams, BATCHES, found.state)
        assert again.value.item() == pytest.approx(unrolled(ended, *hparams.values())[0].item(), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_implicit_strategies_solve_at_the_buffers_that_the_training_left(kind):
    # Of a decay that makes the loss convex.
    net, decay, rate = net_with(kind), torch.tensor(1.0).double(), torch.tensor(RATE).double()
    problem, outer, params = problem_of(net)
    value, ended = unrolled(net, decay, rate)
    weights, shapes = [p.detach().flatten() for p in ended.parameters()], [p.shape for p in ended.parameters()]

    def named(flat: Tensor) -> dict[str, Tensor]:
        parts = zip(flat.split([len(w) for w in weights]), shapes)
        return dict(zip(dict(ended.named_parameters()), (part.view(shape) for part, shape in parts)))

    def inner_loss(flat: Tensor) -> Tensor:
        twin = copy.deepcopy(ended)
        return F.cross_entropy(functional_call(twin, named(flat), BATCHES[-1][0]), BATCHES[-1][1]) + decay * flat @ flat

    at = torch.cat(weights).requires_grad_()
    hessian = torch.autograd.functional.hessian(inner_loss, at)
    twin = copy.deepcopy(ended)
    for module in twin.modules():
        module.training = isinstance(module, _BatchNorm)
    (slope,) = torch.autograd.grad(F.cross_entropy(functional_call(twin, named(at), VAL[0]), VAL[1]), at)
    wanted = -2 * at.detach() @ torch.linalg.solve(hessian, slope)
    for solver in (CG(60, 1e-10), FixedPoint(200, 1e-10)):
        rule = SGD(RATE, learnable=False).double()
        found = Implicit(solver)(problem, rule, outer, params, {"decay": decay}, BATCHES)
        assert found.value.item() == pytest.approx(value.item(), abs=1e-12)
        torch.testing.assert_close(found.grads["decay"], wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_each_particle_has_buffers_of_its_own(kind):
    net, hparams = net_with(kind), hyperparameters()
    problem, outer, params = problem_of(net)
    found = PES(2, 0.01)(problem, SGD(RATE).double(), outer, params, hparams, BATCHES)
    shift = {name: x[0] for name, x in found.state.memory.xi.items()}
    for row, sign in enumerate((0, 1, -1)):
        moved = [h + sign * shift[name] for name, h in hparams.items()]
        assert found.state.memory.values[row].item() == pytest.approx(unrolled(net, *moved)[0].item(), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_by_hypergradients_scores_the_training_that_it_differentiates(kind):
    train = tuple(torch.cat(parts) for parts in zip(*BATCHES))
    scores = []
    for gradients in (True, False):
        objective = HypergradientObjective(
            net_with(kind), F.cross_entropy, train, VAL, SGD(RATE), steps=STEPS, batch=6, gradients=gradients
        )
        scores.append(objective.outcome({"lr": RATE}).score)
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)
