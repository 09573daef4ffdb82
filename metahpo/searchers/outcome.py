"""What an objective may give beside a score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from metahpo.checks import check_type, plain, refuse
from metahpo.errors import SearchArgumentError


@dataclass(frozen=True)
class Outcome:
    """The result of a trial.

    score: a number, or one for each of several objectives. gradients: of the (first) score with respect to settings,
    each in the setting's own unit, by name. notes: plain values that are kept with the trial.
    """

    score: float | tuple[float, ...]
    gradients: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("gradients", "notes"):
            check_type(self, name, getattr(self, name), Mapping, "a mapping by name", error=SearchArgumentError)
        for name, value in self.gradients.items():
            number = plain(value)
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                refuse(self, f"the gradient of {name!r}", value, "a number", SearchArgumentError)
