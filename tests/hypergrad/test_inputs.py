"""What strategies are given: graphs that come in, captured tensors, hyperparameters that few batches use."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metahpo.errors import HypergradientError
from metahpo.hypergrad import CG, PES, FiniteDifference, Forward, Implicit, Unroll
from metahpo.inner import SGD, InnerProblem, Mixed, NoRemat, Reverse, Sqrt

RATE = 0.125
STRATEGIES = [Unroll(), Unroll(truncate=1), Forward(), FiniteDifference(), Implicit(CG(damping=0.1)), PES(2, 0.1)]
BY_NAME = {"ids": lambda strategy: type(strategy).__name__}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = draw(12, 4), draw(12, seed=1)


def loss(params, hparams, batch):
    x, y = batch
    return (x @ params["w"] - y).square().mean() + hparams["decay"].exp() * params["w"].square().sum()


def outer_loss(params, hparams):
    return (draw(8, 4, seed=2) @ params["w"] - 1).square().mean()


def start():
    return {"w": draw(4, seed=3)}


def run(strategy, loss, batches, params=None, hparams=None, outer_loss=outer_loss):
    hparams = hparams or {"decay": torch.tensor(-2.0, dtype=torch.float64)}
    rule = SGD(RATE).double()
    return strategy(InnerProblem(loss), rule, outer_loss, params or start(), hparams, batches)


def plain(loss, batches, params, hparams, outer_loss=outer_loss):
    """The gradient in the hyperparameters by a plain loop; params: from hparams."""
    hparams = {name: h.clone().requires_grad_() for name, h in hparams.items()}
    params = params(hparams)
    for batch in batches:
        grads = torch.autograd.grad(loss(params, hparams, batch), list(params.values()), create_graph=True)
        params = {name: p - RATE * g for (name, p), g in zip(params.items(), grads)}
    return dict(zip(hparams, torch.autograd.grad(outer_loss(params, hparams), list(hparams.values()))))


def free():
    return {name: p.requires_grad_() for name, p in start().items()}


@pytest.mark.parametrize("strategy", STRATEGIES, **BY_NAME)
def test_a_graph_that_comes_in_is_refused(strategy):
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    state = run(strategy, loss, [(X, Y)]).state
    for batches, given in (([(X, Y)], {"w": scale * start()["w"]}), ([(X, Y), {"x": scale * X}], None)):
        with pytest.raises(HypergradientError, match=r"(params\['w'\]|batches:) .*computed from .*lost"):
            run(strategy, loss, batches, given)
        with pytest.raises(HypergradientError, match="computed from"):
            problem, hparams = InnerProblem(loss), {"decay": torch.tensor(-2.0, dtype=torch.float64)}
            strategy(problem, SGD(RATE).double(), outer_loss, given or start(), hparams, batches, state)
    # Parameters of a net require grad; a batch that does is a constant, which is told.
    for x, told in ((X, []), (X.clone().requires_grad_(), ["batches: a tensor [12, 4] requires grad"])):
        warnings = run(strategy, loss, [(x, Y)], free()).warnings
        assert [line.partition(";")[0] for line in warnings if line.startswith("batches")] == told


def test_the_difference_from_initial_parameters_that_depend_on_hyperparameters_trains_alike():
    """What the refusal advises, against a plain loop from those initial parameters."""
    hparams = {"scale": torch.tensor(0.7, dtype=torch.float64)}
    base = lambda p, h, b: (b[0] @ p["w"] - b[1]).square().mean()  # noqa: E731
    outer = lambda p, h: outer_loss(p, h)  # noqa: E731
    expected = plain(base, [(X, Y)] * 3, lambda h: {"w": h["scale"] * start()["w"]}, hparams)

    def moved(p, h):
        return {"w": h["scale"] * start()["w"] + p["w"]}

    for strategy in (Unroll(), Forward()):
        found = run(
            strategy,
            lambda p, h, b: base(moved(p, h), h, b),
            [(X, Y)] * 3,
            {"w": torch.zeros(4, dtype=torch.float64)},
            hparams,
            lambda p, h: outer(moved(p, h), h),
        )
        torch.testing.assert_close(found.grads, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("remat", [NoRemat(), Sqrt()], ids=str)
@pytest.mark.parametrize("gradient", [Reverse(), Mixed()], ids=str)
def test_a_teacher_whose_output_is_detached_is_a_constant(gradient, remat):
    torch.manual_seed(0)
    teacher = nn.Linear(4, 1).double()

    def taught(p, h, b):
        made = b[0].clone()
        made.requires_grad = True
        (slope,) = torch.autograd.grad(teacher(made).sum(), made)
        return loss(p, h, (b[0], teacher(b[0])[:, 0].detach())) + (slope @ p["w"]).square().mean()

    hparams = {"decay": torch.tensor(-2.0, dtype=torch.float64)}
    found = run(Unroll(gradient, remat), taught, [(X, Y)] * 3, hparams=hparams)
    assert found.warnings == ()
    torch.testing.assert_close(found.grads, plain(taught, [(X, Y)] * 3, lambda h: free(), hparams), rtol=1e-10, atol=0)


def test_a_net_that_the_loss_looks_through_is_a_constant_and_said_to_be():
    torch.manual_seed(0)
    seen = nn.Linear(4, 3).double()

    def perceptual(p, h, b):
        return loss(p, h, b) + F.mse_loss(seen(b[0] * p["w"]), seen(b[0]))

    hparams = {"decay": torch.tensor(-2.0, dtype=torch.float64)}
    expected = plain(perceptual, [(X, Y)] * 3, lambda h: free(), hparams)
    for strategy in (Unroll(), Forward()):
        found = run(strategy, perceptual, [(X, Y)] * 3, hparams=hparams)
        assert [line[:56] for line in found.warnings] == ["the inner loss computes with 2 parameters of a module th"]
        torch.testing.assert_close(found.grads, expected, rtol=1e-10, atol=0)


def test_a_captured_hyperparameter_is_refused_by_its_name():
    raw = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
    for hparams in ({"decay": raw}, {"decay": 2 * raw}):
        with pytest.raises(HypergradientError, match=r"the inner loss computes with hparams\['decay'\] as it"):
            run(Unroll(), lambda p, h, b: loss(p, {"decay": raw}, b), [(X, Y)], hparams=hparams)


@pytest.mark.parametrize("strategy", [Unroll(), Forward()], **BY_NAME)
def test_a_hyperparameter_that_a_later_batch_alone_uses_is_not_said_to_be_unused(strategy):
    """Of a kind that torch's kernel cannot differentiate, too."""

    def curriculum(p, h, batch):
        x, y, late = batch
        logits = x[:, :3] * p["w"][:3]
        return F.cross_entropy(logits, y.abs().long().clamp(max=2), h["weights"] if late else None)

    def by_hand(p, h, batch):
        x, y, late = batch
        labels = y.abs().long().clamp(max=2)
        weights = h["weights"][labels] if late else torch.ones_like(y)
        each = -(x[:, :3] * p["w"][:3]).log_softmax(1)[range(12), labels]
        return (weights * each).sum() / weights.sum()

    hparams, batches = {"weights": draw(3, seed=4).exp()}, [(X, Y, late) for late in (False, True, True)]
    found = run(strategy, curriculum, batches, hparams=hparams)
    assert found.warnings == ()
    torch.testing.assert_close(found.grads, plain(by_hand, batches, lambda h: free(), hparams), rtol=1e-10, atol=0)


@pytest.mark.parametrize("strategy", STRATEGIES, **BY_NAME)
def test_a_gradient_has_the_type_of_its_hyperparameter(strategy):
    hparams = {"decay": torch.tensor(-2.0, dtype=torch.bfloat16)}
    assert run(strategy, loss, [(X, Y)] * 2, hparams=hparams).grads["decay"].dtype == torch.bfloat16


def test_pes_runs_one_particle_after_the_other_where_vmap_cannot():
    def force(p, h, b, by_hand=False):
        x = b[0]
        if by_hand:
            slope = 3 * (x @ p["w"]).square()[:, None] * p["w"]
        else:
            x = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad((x @ p["w"]).pow(3).sum(), x, create_graph=True)
        noise = F.dropout(torch.ones_like(b[1]), 0.5)
        return (noise[:, None] * (0.1 * slope - b[1][:, None])).square().mean() + loss(p, h, b)

    found = []
    for by_hand in (True, False):
        torch.manual_seed(0)
        found.append(run(PES(4, 0.1), lambda p, h, b, hand=by_hand: force(p, h, b, hand), [(X, Y)] * 2))
    torch.testing.assert_close(found[0].grads, found[1].grads, rtol=1e-10, atol=0)
    torch.testing.assert_close(found[0].state.memory.params, found[1].state.memory.params, rtol=1e-10, atol=0)
