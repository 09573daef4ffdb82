"""Persistent evolution strategies against particles one by one, and against the theory of their bias and variance."""

from __future__ import annotations

import pytest
import torch

from metahpo.errors import HypergradientError, NonFiniteError
from metahpo.hypergrad import PES, InnerState, Unroll
from metahpo.inner import SGD, InnerProblem, UpdateRule, rule_hparams

WINDOWS, RATE = 8, 0.25


class Momentum(UpdateRule):
    """Heavy ball; its state holds a number beside tensors."""

    def __init__(self):
        super().__init__()
        self.lr = torch.nn.Parameter(torch.tensor(RATE, dtype=torch.float64), requires_grad=False)

    def init(self, params):
        return {"velocity": {name: torch.zeros_like(p) for name, p in params.items()}, "count": 0}

    def forward(self, params, grads, state, step):
        assert state["count"] == step
        velocity = {name: 0.5 * v + grads[name] for name, v in state["velocity"].items()}
        new = {name: p - self.lr * velocity[name] for name, p in params.items()}
        return new, {"velocity": velocity, "count": step + 1}


def later():
    """(problem, rule, outer loss, params, hparams): what costs at once pays off later.

    The fast weight follows the target theta at once and raises the outer loss; the slow one outweighs it in the end, so
    that truncation has the wrong sign. All is linear but the outer loss, a square: smoothing changes no gradient.
    """
    problem = InnerProblem(
        lambda p, h, _: 0.5 * ((p["fast"] - h["theta"]).square() + 0.25 * (p["slow"] - h["theta"]).square())
    )
    params = {name: torch.zeros((), dtype=torch.float64) for name in ("fast", "slow")}
    hparams = {"theta": torch.tensor(0.5, dtype=torch.float64)}
    return problem, SGD(RATE).double(), lambda p, h: 0.5 * (3 * p["slow"] - p["fast"] - 1).square(), params, hparams


def over_windows(strategy, given, windows=WINDOWS, steps=1):
    """The sum of the estimates of consecutive windows."""
    problem, rule, outer_loss, params, hparams = given
    total, state = {name: torch.zeros_like(h) for name, h in hparams.items()}, None
    for _ in range(windows):
        found = strategy(problem, rule, outer_loss, params, hparams, [None] * steps, state)
        params, state = found.final_params, found.state
        total = {name: total[name] + g for name, g in found.grads.items()}
    return total


def exact(given, windows=WINDOWS):
    """The gradient of the sum of the losses after 1, 2, ... windows of one step."""
    problem, rule, outer_loss, params, hparams = given
    ends = (Unroll()(problem, rule, outer_loss, params, hparams, [None] * k) for k in range(1, windows + 1))
    return float(sum(end.grads["theta"] for end in ends))


def test_the_exact_gradient_of_the_windows_has_its_closed_form():
    fast, slow = ([1 - (1 - RATE * k) ** t for t in range(1, WINDOWS + 1)] for k in (1, 0.25))
    slopes = [3 * b - a for a, b in zip(fast, slow)]
    assert exact(later()) == pytest.approx(sum((0.5 * s - 1) * s for s in slopes), rel=1e-12)


def test_is_unbiased_where_truncation_and_plain_evolution_strategies_are_not():
    given = later()
    right, truncated = exact(given), float(over_windows(Unroll(), given)["theta"])
    persistent, plain = (
        torch.stack([over_windows(PES(2000, 0.3, seed, persistent=p), given)["theta"] for seed in range(8)])
        for p in (True, False)
    )
    error = [float(x.std()) / len(x) ** 0.5 for x in (persistent, plain)]
    assert abs(float(persistent.mean()) - right) < 4 * error[0]
    assert abs(float(plain.mean()) - truncated) < 4 * error[1]
    assert abs(truncated - right) > 20 * max(error)
    assert truncated * right < 0


def test_telescoping_estimates_sum_to_the_gradient_of_the_last_loss():
    given = later()
    problem, rule, outer_loss, params, hparams = given
    right = float(Unroll()(problem, rule, outer_loss, params, hparams, [None] * WINDOWS).grads["theta"])
    found = torch.stack([over_windows(PES(1000, 0.3, s, telescoping=True), given)["theta"] for s in range(8)])
    error = float(found.std()) / 8**0.5
    assert abs(float(found.mean()) - right) < 4 * error
    assert abs(exact(given) - right) > 20 * error


def test_its_error_falls_with_the_root_of_the_particles():
    given = later()
    few, many = (
        torch.stack([over_windows(PES(n, 0.3, seed), given, 4)["theta"] for seed in range(40)]).std()
        for n in (40, 4000)
    )
    # The ratio of two deviations of 40 values each is within 11% of 10 as a rule.
    assert 6 < float(few / many) < 16


@pytest.mark.parametrize("telescoping", [False, True])
@pytest.mark.parametrize("persistent", [True, False])
def test_equals_particles_that_train_one_by_one(persistent, telescoping):
    if telescoping and not persistent:
        return
    rule = Momentum()
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (5, 4))
    problem = InnerProblem(lambda p, h, x: (torch.tanh(x @ p["w"]) - 1).square().mean() + h["decay"] @ p["w"].square())
    outer_loss = lambda p, h: (b @ p["w"]).sin().sum() + h["decay"].sum()  # noqa: E731
    params = {"w": torch.ones(3, dtype=torch.float64)}
    hparams = {"decay": torch.full((3,), 0.1, dtype=torch.float64), **rule_hparams(rule)}
    strategy = PES(6, 0.05, persistent=persistent, telescoping=telescoping)
    batches = [a, a[:3], a[1:]]

    before = torch.zeros_like(strategy(problem, rule, outer_loss, params, hparams, [a]).state.memory.values)
    xi_before: dict = {name: 0.0 for name in hparams}
    starts, state, centre = [(params, None, 0)] * 7, None, params
    for window in range(3):
        # Hyperparameters move on between the windows.
        hparams = {name: h * 0.9 for name, h in hparams.items()}
        found = strategy(problem, rule, outer_loss, centre, hparams, batches, state)
        state, centre = found.state, found.final_params
        xi = state.memory.xi
        noise = {name: x - (xi_before[name] if persistent else 0) for name, x in xi.items()}
        shifts = [{name: torch.zeros_like(h) for name, h in hparams.items()}]
        shifts += [{name: sign * x[i] for name, x in noise.items()} for sign in (1, -1) for i in range(3)]
        ends, values = [], []
        for shift, (start, rule_state, step) in zip(shifts, starts):
            moved = {name: h + shift[name] for name, h in hparams.items()}
            end = problem.fit(rule, start, moved, batches, state=rule_state, step=step)
            ends.append((end.params, end.state, end.step))
            values.append(outer_loss(end.params, moved))
        gains = torch.stack(values) - (before if telescoping else 0)
        for name, x in xi.items():
            expected = sum((gains[1 + i] - gains[4 + i]) * x[i] for i in range(3)) / (6 * 0.05**2)
            torch.testing.assert_close(found.grads[name], expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.value, values[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(found.final_params, ends[0][0], rtol=1e-12, atol=0)
        assert state.step == 3 * (window + 1)
        assert found.losses.shape == (3,)
        starts = ends if persistent else [ends[0]] * 7
        before, xi_before = torch.stack(values), xi


def test_the_seed_and_the_window_fix_the_noise():
    problem, rule, outer_loss, params, hparams = later()
    first, same, other = (PES(4, 0.1, seed)(problem, rule, outer_loss, params, hparams, [None]) for seed in (0, 0, 1))
    assert first.grads == same.grads
    assert first.grads != other.grads
    second = PES(4, 0.1)(problem, rule, outer_loss, params, hparams, [None], first.state)
    old, new = first.state.memory.xi["theta"], second.state.memory.xi["theta"]
    assert not torch.isclose(new - old, old).any()


def test_refuses_what_it_cannot_do():
    for arguments, match in [
        ((3, 0.1), "particles should be an even number of at least 2, found 3"),
        ((0, 0.1), "found 0"),
        ((2, 0.0), "sigma should be a number above 0, found 0.0"),
        ((2, 0.1, 0, False, True), "telescoping needs persistent=True"),
    ]:
        with pytest.raises(HypergradientError, match=match):
            PES(*arguments)
    problem, rule, outer_loss, params, hparams = later()
    with pytest.raises(HypergradientError, match="not of an earlier call with 4 particles"):
        PES(4, 0.1)(problem, rule, outer_loss, params, hparams, [None], InnerState(None, 1))


def test_perturbed_trainings_that_diverge_are_told():
    _, rule, outer_loss, params, _ = later()
    problem = InnerProblem(lambda p, h, _: 0.5 * (p["fast"].square() + p["slow"].square()))
    hparams = {"rule.lr": torch.tensor(1.0, dtype=torch.float64)}
    params = {name: p + 1e140 for name, p in params.items()}
    with pytest.raises(NonFiniteError, match=r"\d+ of 8 perturbed trainings diverged by step 80, .* lower sigma"):
        PES(8, 3.0)(problem, rule, outer_loss, params, hparams, [None] * 80)
