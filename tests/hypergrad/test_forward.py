"""Forward mode against reverse mode."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from metahpo.errors import HypergradientError, NetError, NonFiniteError
from metahpo.hypergrad import Forward, InnerState, Unroll, check_hypergradient
from metahpo.inner import LBFGS, SGD, Adam, InnerProblem, Newton, UpdateRule, rule_hparams


class Heavy(UpdateRule):
    """Momentum, with a counter, a tensor that no gradient reaches and an absent one in its state; it asks for the
    loss or not."""

    def __init__(self, needs_loss: bool = False):
        super().__init__()
        self.needs_loss = needs_loss
        self.lr = nn.Parameter(torch.tensor([0.1, 0.2], dtype=torch.float64), requires_grad=False)
        self.momentum = nn.Parameter(torch.tensor(0.7, dtype=torch.float64), requires_grad=False)

    def init(self, params):
        state = {n: (torch.zeros_like(p), torch.ones_like(p)) for n, p in params.items()}
        return {"count": torch.zeros((), dtype=torch.int64), "none": None, **state}

    def forward(self, params, grads, state, step, *loss):
        new = {"count": state["count"] + 1, "none": None}
        assert int(new["count"]) == step + 1
        for i, (name, p) in enumerate(params.items()):
            speed = self.momentum * state[name][0] + grads[name]
            new[name] = (speed, state[name][1])
            params = {**params, name: p - self.lr[i] * speed * state[name][1]}
        return params, new


def with_momentum(given, needs_loss: bool = False):
    problem, _, outer_loss, params, hparams, batches = given
    del hparams["rule.lr"]
    rule = Heavy(needs_loss)
    return problem, rule, outer_loss, params, {**hparams, **rule_hparams(rule)}, batches


@pytest.mark.parametrize("chunk, momentum", [(None, None), (1, None), (None, False), (4, False), (4, True)])
def test_equals_reverse_mode(chunk, momentum, small_problem):
    given = small_problem(3)
    comparison = check_hypergradient(Forward(chunk), *(given if momentum is None else with_momentum(given, momentum)))
    assert max(comparison.by_name.values()) < 1e-10
    torch.testing.assert_close(comparison.result.value, comparison.reference.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(comparison.result.final_params, comparison.reference.final_params, rtol=1e-12, atol=0)
    torch.testing.assert_close(comparison.result.losses, comparison.reference.losses, rtol=1e-12, atol=0)
    assert comparison.result.warnings == ()


@pytest.mark.parametrize(
    "rule", [SGD(0.1, 0.9, nesterov=True), Adam(0.05), LBFGS(), Newton(damping=3.0)], ids=lambda r: type(r).__name__
)
def test_equals_reverse_mode_with_the_rules_of_the_package(rule, small_problem):
    problem, _, outer_loss, params, hparams, batches = small_problem(3)
    del hparams["rule.lr"]
    rule = rule.double()
    given = (problem, rule, outer_loss, params, {**hparams, **rule_hparams(rule)}, batches)
    assert check_hypergradient(Forward(), *given).relative_error < 1e-10


@pytest.mark.parametrize("momentum", [False, True])
def test_two_windows_give_the_gradient_through_both(momentum, small_problem):
    given = small_problem(6)
    problem, rule, outer_loss, params, hparams, batches = with_momentum(given) if momentum else given
    whole = Unroll()(problem, rule, outer_loss, params, hparams, batches)
    first = Forward(3)(problem, rule, outer_loss, params, hparams, batches[:2])
    second = Forward()(problem, rule, outer_loss, first.final_params, hparams, batches[2:], first.state)
    assert second.state.step == 6
    torch.testing.assert_close(second.grads, whole.grads, rtol=1e-10, atol=0)
    again = Forward()(problem, rule, outer_loss, first.final_params, hparams, batches[2:], first.state)
    torch.testing.assert_close(again.grads, second.grads, rtol=0, atol=0)


def net_problem(layer: nn.Module):
    """A net by functional_call, whose dropout draws anew at every step; one decay a tensor, in a dict of shapes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), layer, nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(16, 5).double(), torch.randint(0, 3, (16,))

    def loss(params, hparams, batch):
        decay = sum((hparams[n].exp() * p.square()).sum() for n, p in params.items())
        return F.cross_entropy(functional_call(net, params, (x,)), y) + decay

    params = {n: p.detach() for n, p in net.named_parameters()}
    hparams = {n: torch.full_like(p, -3) for n, p in params.items()}
    rule = SGD(0.5).double()
    outer = lambda p, h: F.cross_entropy(functional_call(net.eval(), p, (x,)), y.flip(0))  # noqa: E731
    return InnerProblem(loss), rule, outer, params, {**hparams, **rule_hparams(rule)}, [None] * 4


@pytest.mark.parametrize("layer", [nn.LayerNorm(6), nn.GroupNorm(2, 6)], ids=lambda m: type(m).__name__)
def test_nets_with_a_decay_of_every_parameter(layer):
    assert check_hypergradient(Forward(20), *net_problem(layer)).relative_error < 1e-10


def test_gradients_that_vmap_cannot_run_are_taken_for_one_direction_after_the_other(monkeypatch):
    grad, refused = torch.autograd.grad, []

    def unbatched(*arguments, is_grads_batched=False, **options):
        if is_grads_batched:
            refused.append(True)
            raise RuntimeError("a layer has no batching rule")
        return grad(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", unbatched)
    assert check_hypergradient(Forward(20), *net_problem(nn.LayerNorm(6))).relative_error < 1e-10
    assert refused


@pytest.mark.parametrize("needs_loss", [False, True])
def test_dropout_draws_once_a_step_whatever_the_chunks(needs_loss):
    problem, rule, outer_loss, params, hparams, batches = net_problem(nn.Identity())
    rule = AskingSGD(0.5).double() if needs_loss else rule

    def noisy(params, hparams, batch):
        loss = problem.loss(params, hparams, batch)
        return loss + F.dropout(params["0.weight"]).square().mean()

    results = []
    for strategy in (Unroll(), Forward(), Forward(30)):
        torch.manual_seed(3)
        arguments = (InnerProblem(noisy), rule, outer_loss, params, hparams, batches)
        # With a state nothing is looked at before, so that each draws the same.
        results.append(strategy(*arguments, InnerState(None, 0)))
    for result in results[1:]:
        torch.testing.assert_close(result.grads, results[0].grads, rtol=1e-9, atol=1e-12)


def test_keeps_nothing_of_a_step(small_problem):
    problem, rule, outer_loss, params, hparams, batches = small_problem(1)

    def counted(steps):
        calls, alive = [], []

        def loss(params, hparams, batch):
            calls.append(None)
            if len(calls) == steps:
                alive.append(sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor and t.numel() > 1))
            return problem.loss(params, hparams, batch)

        Forward(4)(InnerProblem(loss), rule, outer_loss, params, hparams, batches * steps)
        return alive

    assert counted(13) == counted(5)


def test_refuses_what_it_cannot_do(small_problem):
    problem, rule, outer_loss, params, hparams, batches = small_problem()
    with pytest.raises(HypergradientError, match="chunk should be a whole number of at least 1, found 0"):
        Forward(0)
    arguments = (problem, rule, outer_loss, params)
    with pytest.raises(HypergradientError, match="its memory is Tensor, expected that of Forward"):
        Forward()(*arguments, hparams, batches, InnerState(None, 3, torch.ones(3)))
    state = Forward()(*arguments, hparams, batches).state
    with pytest.raises(HypergradientError, match="those that the state carries are"):
        Forward()(*arguments, {**hparams, "decay": torch.ones(3).double()}, batches, state)
    with pytest.raises(HypergradientError, match="all of decay are empty"):
        Forward()(*arguments, {"decay": torch.ones(0).double()}, batches, InnerState(None, 0))
    with pytest.raises(NetError, match=r"an operation of the rule has no forward mode.*; choose Unroll\(\)"):
        Forward()(problem, Refusing(0.1).double(), outer_loss, params, hparams, batches)
    diverging = InnerProblem(lambda p, h, b: sum(q.pow(4).sum() for q in p.values()))
    with pytest.raises(NonFiniteError, match=r"diverged: its loss is (inf|nan) at step \d+ of 40 .* lower its rates"):
        hparams = {"rule.lr": torch.tensor(10.0).double()}
        Forward()(diverging, rule, lambda p, h: p["a"].sum(), params, hparams, [None] * 40)


class AskingSGD(SGD):
    needs_loss = True

    def forward(self, params, grads, state, step, *loss):
        return super().forward(params, grads, state, step)


class Refusing(SGD):
    def forward(self, params, grads, state, step):
        return super().forward({n: _Opaque.apply(p) for n, p in params.items()}, grads, state, step)


class _Opaque(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad
