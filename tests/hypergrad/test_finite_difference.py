"""The finite difference of the last step against the exact derivative of that step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from metahpo.errors import HypergradientError
from metahpo.hypergrad import FiniteDifference, Unroll, check_hypergradient
from metahpo.inner import SGD, InnerProblem, LayerStepRates, UpdateRule, rule_hparams


class RmsMomentum(UpdateRule):
    """A rule that is not linear in the gradient and has a state."""

    def __init__(self):
        super().__init__()
        self.lr = torch.nn.Parameter(torch.tensor(0.1, dtype=torch.float64), requires_grad=False)

    def init(self, params):
        return {name: torch.ones_like(p) for name, p in params.items()}

    def forward(self, params, grads, state, step):
        state = {name: 0.9 * s + 0.1 * grads[name].square() for name, s in state.items()}
        return {name: p - self.lr * grads[name] / state[name].sqrt() for name, p in params.items()}, state


def a_problem(rule, power=None):
    """(problem, rule, outer loss, params, hparams, batches): a decay for each tensor and a weight for each example of a
    two-layer net; with ``power`` 2 of a linear model, whose loss is quadratic in its weights."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, y, val_x, val_y = draw(8, 3), draw(8, 2), draw(6, 3), draw(6, 2)
    params = {"a": draw(3, 4), "b": draw(4, 2)} if power is None else {"a": draw(3, 2)}

    def net(params, x):
        return torch.tanh(x @ params["a"]) @ params["b"] if power is None else x @ params["a"]

    def loss(params, hparams, which):
        errors = (net(params, x[which]) - y[which]).square().mean(1)
        decay = sum(h.exp() * p.pow(power or 2).sum() for h, p in zip(hparams["decay"], params.values()))
        return (torch.sigmoid(hparams["weights"][which]) * errors).mean() + decay

    def outer_loss(params, hparams):
        return F.mse_loss(net(params, val_x), val_y) + 0.01 * hparams["decay"].square().sum()

    hparams = {"decay": draw(len(params)) - 3, "weights": draw(8), **rule_hparams(rule)}
    batches = [torch.randperm(8, generator=generator)[:4] for _ in range(4)]
    return InnerProblem(loss), rule, outer_loss, params, hparams, batches


def error(given, epsilon):
    return check_hypergradient(FiniteDifference(epsilon), *given, reference=Unroll(truncate=1))


@pytest.mark.parametrize("rule", [SGD(0.1).double(), RmsMomentum()], ids=["linear", "nonlinear"])
def test_differs_from_the_exact_last_step_by_the_square_of_epsilon(rule):
    given = a_problem(rule)
    once, half = error(given, 0.04), error(given, 0.02)
    assert 1e-7 < once.relative_error < 1e-2
    assert once.relative_error / half.relative_error == pytest.approx(4, rel=0.05)
    # The rule's own hyperparameters, and what the outer loss uses itself, are exact.
    assert once.by_name["rule.lr"] < 1e-12
    torch.testing.assert_close(once.result.value, once.reference.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(once.result.final_params, once.reference.final_params, rtol=1e-12, atol=0)
    torch.testing.assert_close(once.result.losses, once.reference.losses, rtol=1e-12, atol=0)


def test_is_exact_for_a_loss_quadratic_in_the_weights():
    assert error(a_problem(SGD(0.1).double(), power=2), 0.5).relative_error < 1e-12
    assert error(a_problem(SGD(0.1).double(), power=4), 0.5).relative_error > 1e-6


def test_rates_by_tensor_and_step_are_exact():
    rule = LayerStepRates(["a", "b"], 4, 0.1, learnable=False).double()
    found = error(a_problem(rule), 1e-3)
    assert found.relative_error < 1e-6
    assert all(e < 1e-12 for name, e in found.by_name.items() if name.startswith("rule."))


def test_goes_on_from_its_state():
    problem, rule, outer_loss, params, hparams, batches = a_problem(RmsMomentum())
    whole = FiniteDifference()(problem, rule, outer_loss, params, hparams, batches)
    first = FiniteDifference()(problem, rule, outer_loss, params, hparams, batches[:2])
    second = FiniteDifference()(problem, rule, outer_loss, first.final_params, hparams, batches[2:], first.state)
    assert second.state.step == 4
    torch.testing.assert_close(second.grads, whole.grads, rtol=1e-12, atol=0)


def test_where_nothing_reaches_the_last_gradient_the_mixed_product_is_zero():
    problem, rule, _, params, hparams, batches = a_problem(SGD(0.1).double())
    flat = lambda p, h: p["a"].sum() * 0 + h["decay"].sum()  # noqa: E731
    found = FiniteDifference()(problem, rule, flat, params, hparams, batches)
    torch.testing.assert_close(found.grads["decay"], torch.ones(2, dtype=torch.float64))
    for name in ("weights", "rule.lr"):
        torch.testing.assert_close(found.grads[name], torch.zeros_like(hparams[name]))


def test_the_difference_draws_the_random_numbers_of_the_gradient():
    problem, rule, outer_loss, params, hparams, batches = a_problem(SGD(0.1).double(), power=2)

    def dropped(params, hparams, which):
        return problem.loss({name: F.dropout(p, 0.5) for name, p in params.items()}, hparams, which)

    given = (InnerProblem(dropped), rule, outer_loss, params, hparams, batches)
    found = []
    for strategy in (FiniteDifference(1e-3), Unroll(truncate=1)):
        torch.manual_seed(3)
        found.append(strategy(*given).grads)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_refuses_a_rule_that_needs_the_loss_and_an_epsilon_of_zero():
    class Needy(UpdateRule):
        needs_loss = True

    problem, _, outer_loss, params, hparams, batches = a_problem(SGD(0.1))
    with pytest.raises(HypergradientError, match=r"Needy computes with the loss itself.* Unroll\(truncate=1\)"):
        FiniteDifference()(problem, Needy(), outer_loss, params, hparams, batches)
    with pytest.raises(HypergradientError, match="epsilon should be a number above 0, found 0"):
        FiniteDifference(0)
