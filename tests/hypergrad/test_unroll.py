"""Unrolled hypergradients against finite differences, a closed form and one another."""

from __future__ import annotations

import pytest
import torch

from metahpo.errors import HypergradientError, NonFiniteError
from metahpo.hypergrad import Unroll, check_hypergradient
from metahpo.inner import SGD, Every, InnerProblem, Mixed, NoRemat, Reverse, Sqrt

EXACT = [
    Unroll(gradient, remat)
    for gradient in (Reverse(), Mixed(), Mixed("dual"))
    for remat in (NoRemat(), Every(2), Sqrt())
]


def value_at(hparams, given):
    problem, rule, outer_loss, params, _, batches = given
    with torch.no_grad():
        end = problem.fit(rule, params, hparams, batches)
    return float(outer_loss(end.params, {n: h for n, h in hparams.items() if not n.startswith("rule.")}))


def test_equals_finite_differences_in_every_hyperparameter(small_problem):
    given = small_problem()
    hparams = given[4]
    found = Unroll()(*given)
    assert set(found.grads) == {"decay", "weights", "rule.lr"}
    for name, h in hparams.items():
        for i in range(h.numel()):
            step = torch.zeros_like(h).flatten()
            step[i] = 1e-5
            step = step.view_as(h)
            up, down = (value_at({**hparams, name: h + sign * step}, given) for sign in (1, -1))
            assert float(found.grads[name].flatten()[i]) == pytest.approx((up - down) / 2e-5, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("strategy", EXACT[1:], ids=str)
def test_every_exact_unrolling_gives_the_same(strategy, small_problem):
    comparison = check_hypergradient(strategy, *small_problem(7))
    assert comparison.relative_error < 1e-10
    assert comparison.cosine == pytest.approx(1)
    torch.testing.assert_close(comparison.result.value, comparison.reference.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(comparison.result.final_params, comparison.reference.final_params, rtol=1e-12, atol=0)


def test_a_single_rate_on_a_quadratic_has_its_closed_form():
    curvature, start, rate, steps = 0.7, 2.0, 0.3, 6
    rule = SGD(rate).double()
    problem = InnerProblem(lambda p, h, batch: 0.5 * curvature * p["w"].square().sum())
    params = {"w": torch.tensor([start], dtype=torch.float64)}
    hparams = {"rule.lr": torch.tensor(rate, dtype=torch.float64)}
    found = Unroll()(problem, rule, lambda p, h: p["w"].sum(), params, hparams, [None] * steps)
    assert float(found.value) == pytest.approx(start * (1 - rate * curvature) ** steps, rel=1e-12)
    expected = -start * steps * curvature * (1 - rate * curvature) ** (steps - 1)
    assert float(found.grads["rule.lr"]) == pytest.approx(expected, rel=1e-12)
    assert found.losses.shape == (steps,)
    assert not found.final_params["w"].requires_grad


@pytest.mark.parametrize("remat", [NoRemat(), Sqrt()], ids=str)
def test_goes_on_from_its_state(remat, small_problem):
    problem, rule, outer_loss, params, hparams, batches = small_problem(6)
    whole = Unroll(truncate=3)(problem, rule, outer_loss, params, hparams, batches)
    first = Unroll()(problem, rule, outer_loss, params, hparams, batches[:3])
    second = Unroll(remat=remat)(problem, rule, outer_loss, first.final_params, hparams, batches[3:], first.state)
    assert second.state.step == 6
    torch.testing.assert_close(second.grads, whole.grads, rtol=1e-12, atol=0)
    torch.testing.assert_close(second.final_params, whole.final_params, rtol=1e-12, atol=0)
    exact = Unroll()(problem, rule, outer_loss, params, hparams, batches)
    assert not torch.allclose(exact.grads["rule.lr"], whole.grads["rule.lr"], rtol=0.01)


def test_what_nothing_uses_is_told_and_what_the_rule_uses_is_not(small_problem):
    problem, rule, outer_loss, params, hparams, batches = small_problem()
    found = Unroll()(problem, rule, outer_loss, params, {**hparams, "idle": torch.ones(2)}, batches)
    assert [line.partition(":")[0] for line in found.warnings] == ["hyperparameter 'idle'"]
    torch.testing.assert_close(found.grads["idle"], torch.zeros(2))


def test_refuses_what_would_be_silently_wrong(small_problem):
    problem, rule, outer_loss, params, hparams, batches = small_problem()

    def fails(match, *, loss=problem.loss, rule=rule, outer=outer_loss, hparams=hparams, batches=batches):
        with pytest.raises(HypergradientError, match=match):
            Unroll()(InnerProblem(loss), rule, outer, params, hparams, batches)

    captured = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    fails("the inner loss computes .* pass it in hparams", loss=lambda p, h, b: captured * problem.loss(p, h, b))
    fails("the outer loss computes .* pass it in hparams", outer=lambda p, h: captured * outer_loss(p, h))
    fails(r"the inner loss gave a tensor \[3, 4\], expected a scalar", loss=lambda p, h, b: p["a"])
    fails(r"the outer loss gave float, expected a scalar", outer=lambda p, h: 1.0)
    fails(r"SGD has no hyperparameter 'lrr'; did you mean 'lr'", hparams={"rule.lrr": torch.tensor(0.1)})
    fails(r"'rule.lr'\]: found shape \[2\], SGD has \[\]", hparams={"rule.lr": torch.ones(2)})
    fails("SGD.lr requires grad but is not in hparams", rule=SGD(0.1, learnable=True), hparams={"decay": torch.ones(2)})
    fails("found torch.int64, expected a floating tensor", hparams={"decay": torch.ones(2, dtype=torch.int64)})
    fails("hparams: found none", hparams={})
    fails("batches: found none", batches=[])


def test_a_training_that_diverges_is_told_with_its_step(small_problem):
    _, rule, _, params, _, _ = small_problem()
    problem = InnerProblem(lambda p, h, b: sum(q.pow(4).sum() for q in p.values()))
    outer_loss = lambda p, h: p["a"].sum()  # noqa: E731
    with pytest.raises(NonFiniteError, match=r"diverged: its loss is (inf|nan) at step \d+ of 40 .* lower its rates"):
        Unroll()(problem, rule, outer_loss, params, {"rule.lr": torch.tensor(10.0).double()}, [None] * 40)


def test_the_error_of_truncation_falls_at_the_rate_of_the_curvature():
    """Shaban et al. 2019, theorem 3.4: by 1 - rate * curvature a step kept; here, where all is linear, exactly so."""
    rate, steps = 0.125, 60
    curvature = torch.tensor([0.5, 2.0], dtype=torch.float64)
    problem = InnerProblem(lambda p, h, batch: 0.5 * (curvature * (p["w"] - h["target"]).square()).sum())
    params = {"w": torch.zeros(2, dtype=torch.float64)}
    hparams = {"target": torch.ones(2, dtype=torch.float64)}
    given = (problem, SGD(rate).double(), lambda p, h: p["w"].sum(), params, hparams, [None] * steps)
    exact, shrink = Unroll()(*given).grads["target"], 1 - rate * curvature
    torch.testing.assert_close(exact, 1 - shrink**steps, rtol=1e-12, atol=0)
    for kept in (1, 5, 25):
        error = exact - Unroll(truncate=kept)(*given).grads["target"]
        torch.testing.assert_close(error, shrink**kept - shrink**steps, rtol=1e-10, atol=1e-14)
    for kept in (steps, 2 * steps):
        torch.testing.assert_close(Unroll(truncate=kept)(*given).grads["target"], exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("strategy", [Unroll(), Unroll(Mixed(), Sqrt())], ids=str)
def test_losses_that_nothing_can_learn_from_are_told(small_problem, strategy):
    problem, rule, outer_loss, params, hparams, batches = small_problem()
    cut = InnerProblem(lambda p, h, b: problem.loss({n: q.detach() for n, q in p.items()}, h, b))
    with pytest.raises(HypergradientError, match="the inner loss does not depend on params"):
        strategy(cut, rule, outer_loss, params, hparams, batches)
    found = strategy(problem, rule, lambda p, h: (p["a"] > 0).double().mean(), params, hparams, batches)
    assert any("the outer loss has no derivative" in line for line in found.warnings)
    with pytest.raises(HypergradientError, match=r"hparams\['decay'\] is on meta, params on cpu"):
        strategy(problem, rule, outer_loss, params, {**hparams, "decay": hparams["decay"].to("meta")}, batches)


def test_a_rule_that_captures_a_tensor_is_refused(small_problem):
    problem, _, outer_loss, params, hparams, batches = small_problem()
    outside = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    class Capturing(SGD):
        def update(self, param, grad, state, step, hyper):
            return param - outside * grad, {}

    with pytest.raises(HypergradientError, match=r"the update rule computes .* pass it in hparams"):
        Unroll()(problem, Capturing(0.1).double(), outer_loss, params, hparams, batches)
