"""Rules that use the curvature, against closed forms and finite differences."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call

from metahpo.errors import NetError
from metahpo.functional import kernels
from metahpo.inner import (
    LBFGS,
    ConjugateGradients,
    Every,
    GaussNewton,
    LevenbergMarquardt,
    Mixed,
    Newton,
    Sqrt,
    unroll,
)
from metahpo.inner.linear_solve import solve
from metahpo.inner.rules.gauss_newton import gauss_newton_product


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def outputs(params, batch):
    """Two layers; the batch holds inputs, targets and a weight of the decay."""
    return torch.tanh(batch["x"] @ params["first"]) @ params["second"]


def criterion(z, batch):
    return (0.5 * (z - batch["y"]).pow(2) + 0.1 * z.pow(4)).mean()


def inner_loss(params, carry, batch, step):
    decay = sum(p.pow(2).sum() for p in params.values())
    return criterion(outputs(params, batch), batch) + batch.get("decay", 0.0) * decay, carry


def batch(**more):
    x = torch.linspace(-2, 2, 16).view(8, 2).sin()
    return {"x": x, "y": (3 * x[:, 0]).cos(), **more}


def start():
    return {"first": torch.tensor([[0.5, -0.3], [0.2, 0.8]]), "second": torch.tensor([0.7, -0.4])}


RULES = {
    "newton": lambda: Newton(0.8, damping=0.7),
    "gauss-newton": lambda: GaussNewton(outputs, criterion, 0.8, damping=0.1),
    "levenberg-marquardt": lambda: LevenbergMarquardt(outputs, criterion, damping=0.3),
    "lbfgs": lambda: LBFGS(0.5, history=2),
}


def outer(rule, hyper, decay, **how):
    def update(*arguments):
        return functional_call(rule, hyper, arguments)

    update.init, update.needs_loss = rule.init, rule.needs_loss
    params = unroll(inner_loss, update if hyper else rule, start(), [batch(decay=decay)] * 3, **how).params
    return params["first"].sin().sum() + params["second"].pow(2).sum()


def test_gradient_and_curvature_see_one_mask():
    """A full step on a quadratic loss ends at the minimum of the loss that dropout made, found by a dense solve."""
    masks = []

    def outputs(params, batch):
        mask = torch.nn.functional.dropout(torch.ones(8, 2))
        masks.append(mask)
        return (mask * batch["x"]) @ params["w"]

    def criterion(z, batch):
        return 0.5 * (z - batch["y"]).square().sum()

    data = batch()
    loss = lambda p, c, b, s: (criterion(outputs(p, b), b), c)  # noqa: E731
    end = unroll(loss, Newton(1.0, damping=0.0), {"w": torch.ones(2)}, [data]).params
    assert all(torch.equal(mask, masks[0]) for mask in masks) and len(masks) > 1
    expected = torch.linalg.lstsq(masks[0] * data["x"], data["y"][:, None]).solution[:, 0]
    torch.testing.assert_close(end["w"], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", RULES)
def test_hyperparameters_and_the_loss_pass_finite_differences(name):
    rule = RULES[name]()
    hyper = {name: p.detach().clone().requires_grad_() for name, p in rule.named_parameters()}
    decay = torch.tensor(0.02, requires_grad=True)

    def function(decay, *values):
        return outer(rule, dict(zip(hyper, values)), decay)

    assert torch.autograd.gradcheck(function, (decay, *hyper.values()), eps=1e-6, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_all_ways_through_the_loop_agree(name):
    rule = RULES[name]()
    for p in rule.parameters():
        p.requires_grad_()
    decay = torch.tensor(0.02, requires_grad=True)
    hyper = {name: p.detach() for name, p in rule.named_parameters()}
    wanted = [decay, *rule.parameters()]
    expected = torch.autograd.grad(outer(rule, {}, decay), wanted)
    for how in ({"remat": Every(2)}, {"gradient": Mixed(), "remat": Sqrt()}):
        found = torch.autograd.grad(outer(rule, {}, decay, **how), wanted)
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=lambda text, how=how: f"{how}: {text}")
    ours = torch.func.grad(lambda decay: outer(rule, hyper, decay))(decay.detach())
    torch.testing.assert_close(ours, expected[0], rtol=1e-9, atol=1e-11)
    tangents = (torch.tensor(1.5), {name: torch.tensor(-0.5) for name in hyper})
    _, found = torch.func.jvp(lambda decay, hyper: outer(rule, hyper, decay), (decay.detach(), hyper), tangents)
    torch.testing.assert_close(found, 1.5 * expected[0] - 0.5 * sum(expected[1:]), rtol=1e-9, atol=1e-11)
    decays = torch.tensor([0.0, 0.02, 0.1])
    slopes = torch.func.vmap(torch.func.grad(lambda decay: outer(rule, {}, decay, remat=Every(2))))(decays)
    torch.testing.assert_close(slopes[1], expected[0], rtol=1e-9, atol=1e-11)
    assert (slopes.diff().abs() > 1e-4).all()


def quadratic(matrix, minimum):
    def loss(params, carry, batch, step):
        change = torch.cat([params["a"].reshape(-1), params["b"].reshape(-1)]) - minimum
        return 0.5 * change @ matrix @ change, carry

    return loss


def spd(n):
    root = torch.randn(n, n)
    return root @ root.T + 0.5 * torch.eye(n)


def test_newton_reaches_the_minimum_of_a_quadratic_in_one_step():
    minimum = torch.randn(6)
    loss = quadratic(spd(6), minimum)
    params = {"a": torch.randn(2, 2), "b": torch.randn(2)}
    found = unroll(loss, Newton(), params, [None]).params
    torch.testing.assert_close(found["a"], minimum[:4].view(2, 2), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found["b"], minimum[4:], rtol=1e-10, atol=1e-10)


def test_damped_newton_is_ridge_regression_and_differentiates_as_it():
    # From zero, one step at damping m gives (H + m I)^-1 H minimum.
    matrix, minimum = spd(6), torch.randn(6)
    zero = {"a": torch.zeros(2, 2), "b": torch.zeros(2)}
    damping = torch.tensor(0.3, requires_grad=True)
    rule = Newton(damping=1.0)

    def update(*arguments):
        return functional_call(rule, {"damping": damping}, arguments)

    update.init, update.needs_loss = rule.init, True
    params = unroll(quadratic(matrix, minimum), update, zero, [None]).params
    found = torch.cat([params["a"].reshape(-1), params["b"]])
    damped = matrix + damping.detach() * torch.eye(6)
    expected = torch.linalg.solve(damped, matrix @ minimum)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-10, atol=1e-10)
    (slope,) = torch.autograd.grad(found.sum(), damping)
    torch.testing.assert_close(slope, -torch.linalg.solve(damped, expected).sum(), rtol=1e-9, atol=1e-9)


def test_gauss_newton_solves_linear_least_squares_in_one_step():
    x, y = torch.randn(10, 3), torch.randn(10, 2)

    def outputs(params, batch):
        return batch[0] @ params["w"]

    def criterion(z, batch):
        return (z - batch[1]).pow(2).sum()

    def loss(params, carry, batch, step):
        return criterion(outputs(params, batch), batch), carry

    found = unroll(loss, GaussNewton(outputs, criterion), {"w": torch.randn(3, 2)}, [(x, y)]).params["w"]
    torch.testing.assert_close(found, torch.linalg.lstsq(x, y).solution, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("centred", [False, True])
def test_gauss_newton_product_is_the_dense_one(centred):
    def centred_outputs(params, batch):
        z = outputs(params, batch)
        with torch.no_grad():  # A constant, as a running mean.
            mean = z.mean(0) * centred
        return z - mean

    params, given = start(), batch()
    direction = {name: torch.randn_like(p) for name, p in params.items()}
    jacobian = torch.func.jacrev(centred_outputs)(params, given)
    rows = torch.cat([jacobian[name].reshape(8, -1) for name in params], 1)
    weight = torch.func.hessian(criterion)(centred_outputs(params, given), given)
    expected = rows.T @ weight @ rows @ torch.cat([direction[name].reshape(-1) for name in params])
    found = gauss_newton_product(centred_outputs, criterion, params, direction, given)
    torch.testing.assert_close(torch.cat([found[name].reshape(-1) for name in params]), expected)


def rosenbrock():
    def outputs(params, batch):
        x, y = params["w"]
        return torch.stack([10 * (y - x**2), 1 - x])

    def criterion(z, batch):
        return 0.5 * z.pow(2).sum()

    return outputs, criterion


def test_levenberg_marquardt_fits_rosenbrocks_function_and_never_climbs():
    outputs, criterion = rosenbrock()

    def loss(params, carry, batch, step):
        return criterion(outputs(params, batch), batch), carry

    start = {"w": torch.tensor([-1.2, 1.0])}
    rule = LevenbergMarquardt(outputs, criterion, damping=1.0)
    result = unroll(loss, rule, start, [None] * 40)
    torch.testing.assert_close(result.params["w"], torch.ones(2), rtol=1e-8, atol=1e-8)
    losses = torch.stack(result.losses)
    assert (losses.diff() <= 0).all()
    # Some steps are refused and some accepted; the damping falls to nearly nothing in the end.
    assert (losses.diff() == 0).any()
    assert result.state["factor"] < 1e-3


def test_levenberg_marquardt_takes_more_damping_after_a_poor_step():
    outputs, criterion = rosenbrock()

    def loss(params, carry, batch, step):
        return criterion(outputs(params, batch), batch), carry

    # With no damping the full step from here climbs: x goes to 1, far from the valley y = x^2 at first order.
    start = {"w": torch.tensor([-1.2, 1.0])}
    undamped = unroll(loss, GaussNewton(outputs, criterion), start, [None]).params
    assert loss(undamped, None, None, 0)[0] > loss(start, None, None, 0)[0]
    result = unroll(loss, LevenbergMarquardt(outputs, criterion, damping=1e-8, up=5.0), start, [None])
    assert torch.equal(result.params["w"], start["w"])
    assert result.state["factor"] == 5


@pytest.mark.parametrize("history", [2, 10])
def test_lbfgs_equals_torchs_step_by_step(history):
    matrix = spd(5)

    def value(w):
        return 0.5 * w @ matrix @ w + w.cos().sum()

    w = torch.randn(5)
    twin = w.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([twin], lr=0.7, max_iter=1, history_size=history, tolerance_grad=0)

    def closure():
        optimizer.zero_grad()
        result = value(twin)
        result.backward()
        return result

    rule = LBFGS(0.7, history)
    params = {"w": w}
    state = rule.init(params)
    for step in range(12):
        optimizer.step(closure)
        params, state = rule(params, {"w": torch.func.grad(value)(params["w"])}, state, step)
        torch.testing.assert_close(params["w"], twin.detach(), rtol=1e-11, atol=1e-11)


def test_lbfgs_skips_a_pair_without_positive_curvature():
    # On -w^2 / 2 every pair has negative curvature: the steps stay those of plain gradient ascent from the loss.
    rule, params = LBFGS(0.1), {"w": torch.tensor([0.2, -0.3])}
    state = rule.init(params)
    for step in range(4):
        params, state = rule(params, {"w": -params["w"]}, state, step)
    torch.testing.assert_close(params["w"], torch.tensor([0.2, -0.3]) * 1.1**4)
    assert not state["s"].any()


def test_solve_and_its_derivatives_equal_a_dense_solve():
    matrix, b = spd(7).requires_grad_(), torch.randn(7, requires_grad=True)
    found = solve(lambda matrix, v: matrix @ v, matrix, b, ConjugateGradients())
    expected = torch.linalg.solve(matrix, b)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn(7)
    for ours, theirs in zip(*(torch.autograd.grad(x @ weights, [matrix, b]) for x in (found, expected))):
        # The solve knows its matrix to be symmetric no more than the dense one does.
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_nothing_to_solve_is_zero_and_so_is_its_derivative():
    damping = torch.tensor(0.0, requires_grad=True)
    x = solve(lambda damping, v: (1 + damping) * v, damping, torch.zeros(3), ConjugateGradients())
    assert x.tolist() == [0, 0, 0]
    assert torch.autograd.grad(x.sum(), damping)[0] == 0


def test_a_solve_that_does_not_converge_says_so():
    with pytest.warns(UserWarning, match=r"did not converge: relative residual \S+ after 3 steps"):
        ConjugateGradients(steps=3)(lambda v: torch.arange(1.0, 8) * v, torch.ones(7))
    with pytest.warns(
        UserWarning, match=r"relative residual 1\.0e\+00 after 1 steps; the curvature may not be positive"
    ):
        ConjugateGradients()(lambda v: -v, torch.ones(7))
    with pytest.raises(NetError, match="steps should be a whole number of at least 1, found 0"):
        ConjugateGradients(steps=0)


def test_second_derivatives_are_refused():
    decay = torch.tensor(0.02, requires_grad=True)
    (slope,) = torch.autograd.grad(outer(RULES["newton"](), {}, decay), decay, create_graph=True)
    with pytest.raises(NetError, match="first derivatives alone"):
        torch.autograd.grad(slope, decay)


def test_a_captured_tensor_in_the_outputs_is_refused_where_its_gradient_would_be_lost():
    scale = torch.tensor(2.0, requires_grad=True)
    rule = GaussNewton(lambda params, batch: scale * outputs(params, batch), criterion, 0.5, damping=0.1)
    with pytest.raises(NetError, match=r"the update rule computes .* not among its arguments"):
        unroll(inner_loss, rule, start(), [batch()] * 2, remat=Every(1))


def test_forward_mode_silences_the_one_warning_that_torch_gives_of_itself(monkeypatch):
    def load():
        warnings.warn("`torch.jit.script` is deprecated. Please switch", FutureWarning, stacklevel=1)
        warnings.warn("another", FutureWarning, stacklevel=1)

    monkeypatch.setattr(forward_ad, "_maybe_load_decompositions", load, raising=False)
    with warnings.catch_warnings(record=True) as later:
        warnings.simplefilter("always")
        kernels._load_decompositions.cache_clear()
        with kernels.forward_mode():
            pass
    assert [str(each.message) for each in later] == ["another"]
