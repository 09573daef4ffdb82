"""Every solver against a dense solve."""

from __future__ import annotations

import pytest
import torch

from metahpo.errors import HypergradientError
from metahpo.hypergrad import CG, FixedPoint, Neumann, Nystrom


def spd(size: int, low: float = 0.5, high: float = 1.5) -> torch.Tensor:
    """A symmetric matrix with eigenvalues from ``low`` to ``high``."""
    generator = torch.Generator().manual_seed(size)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return basis @ torch.diag(torch.linspace(low, high, size, dtype=torch.float64)) @ basis.T


def vector(size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


class Counted:
    def __init__(self, matrix):
        self.matrix, self.products = matrix, 0

    def __call__(self, v):
        self.products += 1
        return self.matrix @ v


SOLVERS = [CG(40, 1e-13), CG(40, 1e-13, 0.3), Neumann(60, 0.9, 1e-12), FixedPoint(60, 1e-13), Nystrom(9, 0.3)]


@pytest.mark.parametrize("size", [1, 9])
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_equals_a_dense_solve(solver, size):
    matrix, g = spd(size), vector(size)
    damped = matrix + getattr(solver, "damping", 0) * torch.eye(size, dtype=torch.float64)
    expected = torch.linalg.solve(damped, g)
    for start in (None, vector(size) + 1, 1e9 * vector(size)):
        found = solver(Counted(matrix), g, start)
        torch.testing.assert_close(found.v, expected, rtol=1e-11, atol=1e-12)
        assert found.converged and not found.note
        assert float(found.residual) == pytest.approx(float((g - damped @ found.v).norm() / g.norm()), abs=1e-15)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_nothing_to_solve(solver):
    found = solver(Counted(spd(4)), torch.zeros(4, dtype=torch.float64))
    assert found.converged and float(found.residual) == 0 and not found.v.any()


@pytest.mark.parametrize("solver", [CG(3, 1e-9), Neumann(3, 0.5), FixedPoint(3, 1e-9), Nystrom(3, 0.1, tolerance=1e-9)])
def test_tells_its_true_residual_where_it_stops_early(solver):
    matrix, g = Counted(spd(9)), vector(9)
    found = solver(matrix, g)
    damped = matrix.matrix + getattr(solver, "damping", 0) * torch.eye(9, dtype=torch.float64)
    assert not found.converged and found.steps == 3 and matrix.products == 4 - isinstance(solver, FixedPoint)
    assert float(found.residual) == pytest.approx(float((g - damped @ found.v).norm() / g.norm()), rel=1e-12)


def test_cg_ends_after_as_many_steps_as_there_are_eigenvalues_and_sooner_when_warm():
    basis = torch.linalg.qr(spd(8))[0]
    values = torch.tensor([1.0, 1, 1, 50, 50, 400, 400, 400], dtype=torch.float64)
    matrix, g = basis @ torch.diag(values) @ basis.T, vector(8)
    cold = CG(20, 1e-10)(Counted(matrix), g)
    assert cold.steps == 3
    assert CG(20, 1e-10)(Counted(matrix), g, cold.v).steps == 0
    near = CG(30, 1e-6)(Counted(spd(30, 1, 9)), vector(30))
    warm = CG(30, 1e-6)(Counted(spd(30, 1, 9)), vector(30) + 1e-4, near.v)
    assert warm.converged and warm.steps < near.steps - 5


def test_neumann_sums_its_terms():
    matrix, g, total = spd(5), vector(5), torch.zeros(5, dtype=torch.float64)
    for k in range(4):
        total += 0.3 * torch.linalg.matrix_power(torch.eye(5, dtype=torch.float64) - 0.3 * matrix, k) @ g
    torch.testing.assert_close(Neumann(3, 0.3)(Counted(matrix), g).v, total, rtol=1e-13, atol=0)


def test_nystrom_is_the_papers_inverse_and_draws_by_its_seed():
    size, rank, damping = 12, 4, 0.05
    matrix, g = spd(size, 0.1, 5), vector(size)
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(3))[:rank]
    columns = matrix[:, drawn]
    low_rank = columns @ torch.linalg.inv(matrix[drawn][:, drawn]) @ columns.T
    expected = torch.linalg.solve(low_rank + damping * torch.eye(size, dtype=torch.float64), g)
    solver = Nystrom(rank, damping, seed=3)
    torch.testing.assert_close(solver(Counted(matrix), g).v, expected, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(Nystrom(rank, damping, seed=4)(Counted(matrix), g).v, expected)


def test_nystrom_is_exact_where_the_matrix_has_that_rank():
    factor = torch.stack([vector(20), vector(20).flip(0)], 1)
    matrix, g = factor @ factor.T, vector(20) + 1
    expected = torch.linalg.solve(matrix + 1e-3 * torch.eye(20, dtype=torch.float64), g)
    for rank in (2, 5):
        found = Nystrom(rank, 1e-3)(Counted(matrix), g)
        assert found.converged
        torch.testing.assert_close(found.v, expected, rtol=1e-7, atol=1e-7)


def test_cg_tells_negative_curvature_and_damping_lifts_it():
    matrix, g = torch.diag(torch.tensor([1.0, 2, -0.5], dtype=torch.float64)), torch.ones(3, dtype=torch.float64)
    found = CG()(Counted(matrix), g)
    assert "curvature" in found.note and not found.converged
    assert CG(damping=1.0)(Counted(matrix), g).note == ""


@pytest.mark.parametrize("solver", [CG(1000, 1e-6), Neumann(200, 1e4), FixedPoint(9000)], ids=str)
def test_divergence_shows_in_the_residual(solver):
    matrix = torch.full((3, 3), torch.nan) if isinstance(solver, CG) else 1e3 * spd(3).float()
    found = solver(Counted(matrix), vector(3).float())
    assert not torch.isfinite(found.residual) and not found.converged


def test_refuses_settings_that_no_solver_can_have():
    for make, match in (
        (lambda: CG(tolerance=1.5), "CG: tolerance should be a number of at least 0 and below 1, found 1.5"),
        (lambda: CG(tolerance=float("inf")), "CG: tolerance should be .* found inf"),
        (lambda: Neumann(tolerance=float("nan")), "Neumann: tolerance should be .* found nan"),
        (lambda: Nystrom(seed=True), "Nystrom: seed should be a whole number of at least 0, found True"),
        (lambda: CG(damping="0.1"), "CG: damping should be a number of at least 0, found '0.1'"),
        (lambda: CG(0), "CG: steps should be a whole number of at least 1, found 0"),
        (lambda: CG(tolerance=-1.0), "CG: tolerance should be a number of at least 0 and below 1, found -1.0"),
        (lambda: CG(damping=-1.0), "CG: damping should be a number of at least 0, found -1.0"),
        (lambda: Neumann(scale=0.0), "Neumann: scale should be a number above 0, found 0.0"),
        (lambda: FixedPoint(1.5), "FixedPoint: steps should be a whole number of at least 1, found 1.5"),
        (lambda: Nystrom(0), "Nystrom: rank should be a whole number of at least 1, found 0"),
        (lambda: Nystrom(damping=0.0), "Nystrom: damping should be a number above 0, found 0.0"),
    ):
        with pytest.raises(HypergradientError, match=match):
            make()
