"""The inner loop against closed forms and finite differences."""

from __future__ import annotations

from itertools import repeat

import pytest
import torch

from metahpo.errors import NetError
from metahpo.inner import SGD, FirstOrder, LayerStepRates, Reverse, unroll


def linear_loss(params, carry, x, step):
    """0.5 (x.w)^2."""
    return 0.5 * (x @ params["w"]) ** 2, carry


@pytest.mark.parametrize(
    ("gradient", "support", "query", "inner", "adapted", "outer", "grad"),
    [
        (Reverse(), [1, 2, 3], [4, 5, 6], 264.5, [-9.5, -20, -29.5], 49612.5, [3780, 8505, 13230]),
        (FirstOrder(), [4, 5, 6], [1, 2, 3], 1404.5, [-104, -129.5, -154], 340312.5, [-825, -1650, -2475]),
    ],
)
def test_one_linear_layer_exactly(gradient, support, query, inner, adapted, outer, grad):
    # One step at rate 0.5 from w = [2, 3, 5], by hand; torchmeta pins the same numbers.
    w = torch.tensor([2.0, 3.0, 5.0], requires_grad=True)
    support, query = torch.tensor(support).float(), torch.tensor(query).float()
    result = unroll(linear_loss, SGD(0.5), {"w": w}, [support], gradient=gradient)
    assert result.losses[0].item() == inner
    assert result.params["w"].tolist() == adapted
    value, _ = linear_loss(result.params, None, query, 0)
    assert value.item() == outer
    assert torch.autograd.grad(value, w)[0].tolist() == grad


def test_trajectory_is_gradient_descent_step_by_step():
    target = torch.randn(3, dtype=torch.float64)

    def loss(params, count, batch, step):
        return 0.5 * (params["w"] - target).pow(2).sum(), count + step

    result = unroll(loss, SGD(0.25), {"w": torch.zeros(3, dtype=torch.float64)}, repeat(None, 4), carry=0)
    for step, params in enumerate(result.steps, start=1):
        torch.testing.assert_close(params["w"], target * (1 - 0.75**step))
    assert result.carry == 0 + 1 + 2 + 3
    assert len(result.losses) == 4


def test_layer_step_rates_use_their_row_and_column_and_refuse_strangers():
    rule = LayerStepRates(["a", "b"], steps=2, lr=0.0)
    with torch.no_grad():
        rule.rates.copy_(torch.tensor([[1.0, 2.0], [-3.0, 4.0]]))
    zeros = {"a": torch.zeros(()), "b": torch.zeros(())}
    ones = {name: torch.ones(()) for name in zeros}
    for step, expected in enumerate([(-1, 3), (-2, -4), (-2, -4)]):
        params, _ = rule(zeros, ones, None, step)
        assert (params["a"].item(), params["b"].item()) == expected
    with pytest.raises(NetError, match="no rate for 'c'"):
        rule({"c": torch.zeros(())}, {"c": torch.ones(())}, None, 0)


@pytest.mark.parametrize("learnable_rule", ["sgd", "rates"])
def test_outer_gradient_passes_finite_differences_in_weights_and_rates(learnable_rule):
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    shapes = {"w1": (3, 4), "w2": (4, 2)}
    rule = SGD(0.1, learnable=True) if learnable_rule == "sgd" else LayerStepRates(shapes, 3, 0.1)
    rule = rule.double()
    (rate_name, rate), *_ = rule.named_parameters()

    def loss(params, carry, batch, step):
        inputs, targets = batch
        return (torch.tanh(inputs @ params["w1"]) @ params["w2"] - targets).pow(2).mean(), carry

    def outer(rates, *weights):
        def run(params, grads, state, step):
            return torch.func.functional_call(rule, {rate_name: rates}, (params, grads, state, step))

        run.init = rule.init
        result = unroll(loss, run, dict(zip(shapes, weights)), repeat((x[:3], y[:3]), 3))
        return loss(result.params, None, (x[3:], y[3:]), 0)[0]

    inputs = [rate.detach().clone().requires_grad_()]
    inputs += [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes.values()]
    assert torch.autograd.gradcheck(outer, inputs, rtol=1e-6, atol=1e-8)


def test_first_order_keeps_no_graph_of_the_inner_gradient():
    w = torch.randn(3, requires_grad=True)
    frozen = torch.randn(3, requires_grad=True)

    def loss(params, carry, batch, step):
        return (params["w"] * frozen).pow(2).sum(), carry

    result = unroll(loss, SGD(0.1), {"w": w}, [None, None], gradient=FirstOrder())
    grads = torch.autograd.grad(result.params["w"].sum(), [w, frozen], allow_unused=True)
    assert grads[0].tolist() == [1, 1, 1]
    assert grads[1] is None
