"""What an objective may give beside a score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """The result of a trial.

    score: a number, or one for each of several objectives. gradients: of the (first) score with respect to settings,
    each in the setting's own unit, by name. notes: plain values that are kept with the trial.
    """

    score: float | tuple[float, ...]
    gradients: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
