"""A trial as the study keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from metahpo.searchers.space import Settings


@dataclass(frozen=True)
class TrialRecord:
    """One trial of a study.

    scores: one an objective, None unless complete. error: of a failed one, the traceback or what was wrong with its
    score. budget, parent, notes: see ``Proposal``. reports: what the objective reported, by step. seconds: of the
    attempt that ended it. deaths: how often its worker died; stalled: how often in a row without having reported
    a later step than at the death before, which was ``reached``.
    """

    number: int
    settings: Settings
    state: Literal["complete", "failed", "running"]
    scores: tuple[float, ...] | None = None
    error: str | None = None
    budget: float | None = None
    parent: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    gradients: Mapping[str, float] = field(default_factory=dict)
    reports: Mapping[int, float] = field(default_factory=dict)
    seconds: float | None = None
    deaths: int = 0
    stalled: int = 0
    reached: int = -1
    # The notes that came with the proposal: what a searcher may see before the trial has ended.
    proposed: Mapping[str, Any] = field(default_factory=dict)
    # The virtual clock's times and how many trials had ended by it: see ``VirtualClock``.
    clock: tuple[float, float, int] | None = None

    @property
    def score(self) -> float | None:
        """The first objective's."""
        return self.scores[0] if self.scores else None


def plain(tree: Any) -> Any:
    """The same in plain values, as it will be read back: tuples as lists, what JSON does not know as its text."""
    return json.loads(json.dumps(tree, default=_plain))


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else dict(value) if isinstance(value, Mapping) else str(value)
