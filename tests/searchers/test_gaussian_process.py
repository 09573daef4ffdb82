"""The process against gpytorch's, its gradient against finite differences, the climb against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from botorch.models import SingleTaskGP
from gpytorch.constraints import Positive
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ZeroMean
from gpytorch.mlls import ExactMarginalLogLikelihood
from scipy.optimize import minimize
from scipy.stats import gamma, norm

from metahpo.searchers import Choice, Float, Int, Space
from metahpo.searchers.acquisition import ACQUISITIONS, Cube, acquisition, keys, maximised
from metahpo.searchers.gaussian_process import (
    JITTER,
    GaussianProcess,
    Hyperparameters,
    features,
    fit,
    negative_log_posterior,
)

SPACE = Space(a=Float(0, 1), b=Choice("x", "y", "z"), c=Int(1, 9))


@pytest.fixture
def observed():
    rng = np.random.default_rng(3)
    points = np.array([SPACE.encode(SPACE.sample(rng)) for _ in range(25)])
    inputs, owners = features(SPACE, points)
    values = np.sin(5 * points[:, 0]) + (points[:, 1] > 0.4) + points[:, 2] + 0.1 * rng.normal(size=25)
    return inputs, owners, (values - values.mean()) / values.std()


def squares(inputs, owners):
    return np.stack(
        [
            np.square(inputs[:, None, owners == s] - inputs[None, :, owners == s]).sum(-1)
            for s in range(owners.max() + 1)
        ]
    )


def reference(logarithms, inputs, owners, values) -> SingleTaskGP:
    """BoTorch's model with the same hyperparameters."""
    kernel = ScaleKernel(MaternKernel(2.5, ard_num_dims=inputs.shape[1])).double()
    kernel.base_kernel.lengthscale = torch.as_tensor(np.exp(logarithms[:-2])[owners])
    kernel.outputscale = torch.tensor(np.exp(2 * logarithms[-2]))
    likelihood = GaussianLikelihood(noise_constraint=Positive()).double()
    likelihood.noise = torch.tensor(np.exp(2 * logarithms[-1]) + JITTER)
    given = {"likelihood": likelihood, "covar_module": kernel, "mean_module": ZeroMean(), "outcome_transform": None}
    return SingleTaskGP(torch.as_tensor(inputs), torch.as_tensor(values)[:, None], **given)


def test_options_of_a_choice_are_at_distance_one():
    inputs, owners = features(SPACE, np.array([SPACE.encode({"a": 0.5, "b": b, "c": 3}) for b in "xyz"]))
    assert owners.tolist() == [0, 1, 1, 1, 2]
    distances = squares(inputs, owners)
    np.testing.assert_allclose(distances[1], 1 - np.eye(3), atol=1e-15)
    assert not distances[[0, 2]].any()


@pytest.mark.parametrize("seed", range(3))
def test_the_posterior_density_is_gpytorchs_with_the_priors(observed, seed):
    inputs, owners, values = observed
    rng = np.random.default_rng(seed)
    points = [rng.normal(size=5) * 0.5 - 0.5 for _ in range(2)]
    found = []
    for logarithms in points:
        gp = reference(logarithms, inputs, owners, values).train()
        likelihood = ExactMarginalLogLikelihood(gp.likelihood, gp)(gp(*gp.train_inputs), gp.train_targets)
        signal, noise = np.exp(2 * logarithms[-2:])
        prior = (
            norm.logpdf(logarithms[:-2], 0.3, 0.6).sum() + gamma.logpdf(signal, 2) + gamma.logpdf(noise, 3, scale=0.1)
        )
        found.append(-float(likelihood.detach()) * len(values) - prior)
    ours = [negative_log_posterior(p, squares(inputs, owners), values)[0] for p in points]
    # Each is so up to a constant.
    assert ours[0] - ours[1] == pytest.approx(found[0] - found[1], rel=1e-9)


def test_its_gradient_is_that_of_finite_differences(observed):
    inputs, owners, values = observed
    at = np.array([-0.5, 0.3, -1.0, 0.2, -1.5])
    gradient = negative_log_posterior(at, squares(inputs, owners), values)[1]
    for place, step in enumerate(1e-5 * np.eye(5)):
        up, down = (negative_log_posterior(at + s * step, squares(inputs, owners), values)[0] for s in (1, -1))
        assert gradient[place] == pytest.approx((up - down) / 2e-5, rel=1e-6, abs=1e-6)


def test_the_fit_is_as_good_as_from_many_starts(observed):
    inputs, owners, values = observed
    rng = np.random.default_rng(0)
    starts = [rng.normal(size=5) - 0.5 for _ in range(20)]
    best = min(
        minimize(negative_log_posterior, start, (squares(inputs, owners), values), "L-BFGS-B", True).fun
        for start in starts
    )
    assert fit(inputs, owners, values).fit == pytest.approx(best, abs=1e-3)


@pytest.mark.parametrize("together", [1, 3])
def test_predictions_are_botorchs(observed, together):
    inputs, owners, values = observed
    logarithms = np.array([-0.5, 0.3, -1.0, 0.2, -1.5])
    ours = GaussianProcess(Hyperparameters.of(logarithms, 0.0), inputs, owners, values)
    points = torch.rand(7, together, inputs.shape[1], dtype=torch.float64)
    found, expected = ours.posterior(points), reference(logarithms, *observed).eval().posterior(points)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        found.distribution.covariance_matrix, expected.distribution.covariance_matrix, rtol=1e-6, atol=1e-6
    )


def test_the_acquisitions_are_their_formulas(observed):
    inputs, owners, values = observed
    gp = GaussianProcess(fit(inputs, owners, values), inputs, owners, values)
    points = torch.rand(50, 1, inputs.shape[1], dtype=torch.float64)
    posterior = gp.posterior(points)
    mean, deviation = posterior.mean.flatten().numpy(), posterior.variance.flatten().sqrt().numpy()
    best = 0.3
    z = (mean - best) / deviation
    expected = {
        "log_ei": np.log(deviation * (norm.pdf(z) + z * norm.cdf(z))),
        "pi": norm.cdf(z),
        "ucb": mean + np.sqrt(2.0) * deviation,
    }
    for name, value in expected.items():
        found = acquisition(name, gp, best, 2.0, None, 0)(points).detach().numpy()
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-8, err_msg=name)
    batch = acquisition("batch_ei", gp, best, 2.0, None, 0)(points).detach().numpy()
    # It samples, and smooths the improvement a little.
    sure = expected["log_ei"] > -3
    assert sure.sum() > 10
    np.testing.assert_allclose(batch[sure], expected["log_ei"][sure], atol=0.4)


def test_a_batch_keeps_away_from_the_trials_at_work(observed):
    inputs, owners, values = observed
    gp = GaussianProcess(fit(inputs, owners, values), inputs, owners, values)
    points = torch.rand(200, 1, inputs.shape[1], dtype=torch.float64)
    alone = acquisition("batch_ei", gp, 0.3, 2.0, None, 0)(points)
    best = points[int(alone.argmax())]
    joint = acquisition("batch_ei", gp, 0.3, 2.0, best.numpy(), 0)(points)
    # Of the two together: a second one beside the first adds nothing.
    assert float(joint[int(alone.argmax())]) == pytest.approx(float(alone.max()), abs=0.05)
    assert int(joint.argmax()) != int(alone.argmax())


def test_a_climb_finds_what_brute_force_finds():
    space = Space(a=Int(0, 19), b=Choice(*"vwxyz"), c=Int(1, 80, log=True), d=Float(0, 1, step=0.25))
    rng = np.random.default_rng(5)
    slopes = rng.normal(size=(4, 5))
    cube = Cube(space)

    def score(points):
        return np.cos(7 * points @ slopes).sum(1) - 3 * np.square(points - 0.3).sum(1)

    every = cube.snap(np.array([space.encode(settings) for settings in itertools.islice(space.grid(), None)]))
    order = np.argsort(-score(every))
    found = maximised(cube, score, every[:2], rng)
    assert found is not None
    # 40,000 points, of which about 2,000 are looked at.
    assert score(found[None])[0] >= score(every[order[1:2]])[0]
    assert maximised(cube, score, every[:2], np.random.default_rng(0), keys(every)) is None


def test_a_climb_in_a_continuous_space_is_fine():
    space = Space(a=Float(0, 1), b=Float(1e-4, 1, log=True), c=Float(-2, 2))
    peak = np.array([0.123456, 0.654321, 0.9])
    found = maximised(
        Cube(space), lambda p: -np.square(p - peak).sum(1), np.full((1, 3), 0.5), np.random.default_rng(0)
    )
    np.testing.assert_allclose(found, peak, atol=5e-3)


def test_points_are_snapped_to_the_settings_there_are():
    space = Space(
        rule=Choice("sgd", "adam"),
        momentum=Float(0, 1, when={"rule": "sgd"}),
        warm=Choice(True, False, when={"rule": "sgd"}),
        epochs=Int(1, 64, log=True, when={"warm": True}),
        lr=Float(1e-3, 1, log=True),
        width=Int(0, 10**6),
    )
    rng = np.random.default_rng(0)
    raw = rng.random((300, 6))
    for point, given in zip(Cube(space).snap(raw.copy()), raw):
        settings = space.decode(given)
        space.check(settings)
        assert space.decode(point) == settings
        np.testing.assert_allclose(point, space.encode(settings), atol=2e-6)


def test_unknown_names_are_all_told():
    assert ACQUISITIONS == ("log_ei", "ucb", "pi", "batch_ei")
