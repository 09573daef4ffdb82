"""Implicit hypergradients against the closed form of ridge regression."""

from __future__ import annotations

import pytest
import torch

from metahpo.hypergrad import CG, FixedPoint, Implicit, InnerState, Neumann, Nystrom
from metahpo.inner import SGD, InnerProblem

RATE = 0.4
SOLVERS = [CG(200, 1e-12), Neumann(150, RATE, 1e-12), FixedPoint(150, 1e-12), Nystrom(6, 1e-12)]


class Ridge:
    """Ridge regression of two tensors of parameters, "w" [3, 1] and "b" []: its minimum in closed form."""

    def __init__(self, per_parameter: bool = False, rows: int = 12):
        generator = torch.Generator().manual_seed(1)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.x, self.y, self.val_x, self.val_y = draw(rows, 3), draw(rows), draw(8, 3), draw(8)
        decay = {"w": draw(3, 1), "b": draw()} if per_parameter else {"all": draw()}
        self.hparams = {f"decay.{name}": 0.3 * d for name, d in decay.items()}
        self.problem, self.rule = InnerProblem(self.loss), SGD(RATE).double()
        self.batches = [(self.x, self.y)]
        self.params = {"w": torch.zeros(3, 1, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}

    def loss(self, params, hparams, batch):
        x, y = batch
        errors = (x @ params["w"]).squeeze(1) + params["b"] - y
        decay = sum((hparams.get(f"decay.{n}", hparams.get("decay.all")).exp() * p**2).sum() for n, p in params.items())
        return 0.5 * errors.square().mean() + 0.5 * decay

    def outer_loss(self, params, hparams):
        errors = (self.val_x @ params["w"]).squeeze(1) + params["b"] - self.val_y
        return errors.square().mean() + 0.01 * sum(h.square().sum() for h in hparams.values())

    def minimum(self, hparams):
        """The parameters at which the inner gradient is zero, by a dense solve."""
        x = torch.cat([self.x, torch.ones_like(self.x[:, :1])], 1)
        ends = [hparams.get(f"decay.{n}", hparams.get("decay.all")).expand(p.shape) for n, p in self.params.items()]
        decay = torch.cat([end.flatten() for end in ends]).exp()
        v = torch.linalg.solve(x.T @ x / len(x) + torch.diag(decay), x.T @ self.y / len(x))
        return {"w": v[:3, None], "b": v[3]}

    def expected(self):
        """The outer loss at the minimum and its gradient in the hyperparameters, through the dense solve."""
        hparams = {n: h.clone().requires_grad_() for n, h in self.hparams.items()}
        value = self.outer_loss(self.minimum(hparams), hparams)
        return value.detach(), dict(zip(hparams, torch.autograd.grad(value, list(hparams.values()))))

    def at_minimum(self, strategy, **kwargs):
        state = kwargs.pop("state", InnerState(None, 0))
        arguments = (self.rule, self.outer_loss, self.minimum(self.hparams), self.hparams, self.batches, state)
        return strategy.hypergradient_at(self.problem, *arguments)


@pytest.mark.parametrize("per_parameter", [False, True])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_equals_the_closed_form(solver, per_parameter):
    ridge = Ridge(per_parameter)
    value, grads = ridge.expected()
    found = ridge.at_minimum(Implicit(solver))
    assert found.warnings == ()
    torch.testing.assert_close(found.value, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.grads, grads, rtol=1e-9, atol=1e-11)
    trained = Implicit(solver)(
        ridge.problem, ridge.rule, ridge.outer_loss, ridge.params, ridge.hparams, ridge.batches * 100
    )
    assert trained.warnings == ()
    assert trained.losses.shape == (100,)
    assert trained.state.step == 100
    torch.testing.assert_close(trained.grads, grads, rtol=1e-9, atol=1e-11)
