"""One hypergradient strategy against another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from metahpo.functional.trees import Params
from metahpo.hypergrad.base import Hypergradient, OuterLoss, Strategy, collected
from metahpo.hypergrad.measure import measured
from metahpo.hypergrad.unroll import Unroll
from metahpo.inner.gradient import Reverse
from metahpo.inner.problem import InnerProblem
from metahpo.inner.rules.base import UpdateRule


@dataclass(frozen=True)
class Comparison:
    """A strategy's hypergradient beside a reference's, all hyperparameters together.

    relative_error: the norm of the difference over the reference's norm; cosine: of the angle between them; by_name:
    the relative error of each hyperparameter; seconds, peak_bytes: of the strategy and of the reference (None where the
    system does not tell; see ``measured``).
    """

    relative_error: float
    cosine: float
    by_name: dict[str, float]
    seconds: float
    peak_bytes: int | None
    reference_seconds: float
    reference_peak_bytes: int | None
    result: Hypergradient
    reference: Hypergradient

    def __str__(self) -> str:
        memory = [f"{b / 1e6:.1f} MB" if b is not None else "-" for b in (self.peak_bytes, self.reference_peak_bytes)]
        lines = [
            f"relative error {self.relative_error:.2e}, cosine {self.cosine:.6f}",
            f"{self.seconds:.3g} s, {memory[0]}; reference {self.reference_seconds:.3g} s, {memory[1]}",
            *(f"  {name}: {error:.2e}" for name, error in self.by_name.items()),
            *(f"warning: {line}" for line in self.result.warnings),
        ]
        return "\n".join(lines)


def check_hypergradient(
    strategy: Strategy,
    problem: InnerProblem,
    rule: UpdateRule,
    outer_loss: OuterLoss,
    params: Params,
    hparams: Params,
    batches: Iterable[Any],
    *,
    reference: Strategy = Unroll(Reverse()),
) -> Comparison:
    """Runs both from the same start and compares. Each runs on one batch first, which is not counted."""
    batches = collected(batches)
    device = next(iter(params.values())).device
    rows = []
    for each in (strategy, reference):
        each(problem, rule, outer_loss, params, hparams, batches[:1])
        # The same draws (dropout) for both.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            rows.append(measured(lambda each=each: each(problem, rule, outer_loss, params, hparams, batches), device))
    (found, seconds, peak), (expected, expected_seconds, expected_peak) = rows
    flat, right = _flat(found.grads), _flat(expected.grads)
    return Comparison(
        relative_error(flat, right),
        float(torch.nn.functional.cosine_similarity(flat, right, dim=0)),
        {name: relative_error(found.grads[name], expected.grads[name]) for name in hparams},
        seconds,
        peak,
        expected_seconds,
        expected_peak,
        found,
        expected,
    )


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of ``expected``; where that is zero, the norm of the difference."""
    difference, size = (found.double() - expected.double()).norm(), expected.double().norm()
    return float(difference / size if size > 0 else difference)


def _flat(grads: Params) -> torch.Tensor:
    return torch.cat([g.flatten() for g in grads.values()])
