"""What a searcher is: from the trials so far to the next one's settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, overload

import numpy as np

from metahpo.searchers.space import Settings, Space, key


@dataclass(frozen=True)
class Observation:
    """A trial as a searcher sees it.

    losses: one an objective, lower is better (a score to maximise has its sign changed); None unless complete. budget:
    how much training it was given in all, in the units of the search's fidelity (epochs, ...); None: the full one.
    parent: the number of the trial whose checkpoint it went on from. notes: what the searcher itself kept with it.
    gradients: of the first loss with respect to settings, by name, where the objective told them.
    """

    number: int
    settings: Settings
    state: Literal["complete", "failed", "pending"]
    losses: tuple[float, ...] | None = None
    budget: float | None = None
    parent: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    gradients: Mapping[str, float] = field(default_factory=dict)
    loss: float | None = None

    def __post_init__(self) -> None:
        if self.loss is None and self.losses:
            object.__setattr__(self, "loss", self.losses[0])

    @cached_property
    def key(self) -> str:
        """Of its settings, by which those of two trials are told apart quickly."""
        return key(self.settings)


class History(Sequence[Observation]):
    """The trials so far, by number. ``loss`` of each is one number, also where there are several
    objectives.

    known: settings that are not to be suggested again, beside those of these trials: of trials whose
    losses cannot be compared with theirs, as of another budget.
    """

    def __init__(
        self, observations: Sequence[Observation] = (), known: Iterable[Settings] = ()
    ):
        self._all, self._known = list(observations), list(known)

    @overload
    def __getitem__(self, index: int) -> Observation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Observation]: ...
    def __getitem__(self, index: int | slice) -> Observation | list[Observation]:
        return self._all[index]

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Observation]:
        return iter(self._all)

    @property
    def known(self) -> list[Settings]:
        """All settings that a trial had already, of these trials and of others."""
        return [*(o.settings for o in self._all), *self._known]

    @cached_property
    def tried(self) -> set[str]:
        """The keys of ``known``."""
        return {o.key for o in self._all} | {key(settings) for settings in self._known}

    @cached_property
    def complete(self) -> list[Observation]:
        """Those with a loss."""
        return [o for o in self._all if o.state == "complete"]

    @cached_property
    def failed(self) -> list[Observation]:
        """Those that raised, diverged or gave NaN."""
        return [o for o in self._all if o.state == "failed"]

    @cached_property
    def pending(self) -> list[Observation]:
        """Those at work, whose settings are known and whose loss is not."""
        return [o for o in self._all if o.state == "pending"]

    @cached_property
    def told(self) -> list[tuple[Observation, float]]:
        """Complete and failed ones with their loss, a failed one's being the worst of the complete ones (or 0)."""
        worst = max((o.loss for o in self.complete if o.loss is not None), default=0.0)
        return [(o, worst if o.loss is None else o.loss) for o in self._all if o.state != "pending"]


@dataclass(frozen=True)
class Proposal:
    """The next trial: its settings and, from a multi-fidelity searcher, how far to train it and from which trial on.

    notes: plain values that the searcher finds again in the trial's ``Observation``.
    """

    settings: Settings
    budget: float | None = None
    parent: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


class Searcher:
    """Base of all searchers; a subclass writes ``suggest``, and is a frozen dataclass of its options.

    A searcher keeps no state of its own: what it suggests follows from the history, the space and ``rng`` alone, so a
    search goes on after any crash. (It may keep what is quicker to extend than to compute again.)
    """

    # Whether a suggestion depends on the losses so far. Where it does not, no worker ever waits for another.
    adaptive: ClassVar[bool] = True

    def suggest(self, history: History, space: Space, rng: np.random.Generator) -> Settings | Proposal | None:
        """The next trial's settings; ``rng`` is seeded by the study's seed and the trial's number.

        None: nothing can be suggested before a pending trial is done; with none pending, the search is over.
        """
        raise NotImplementedError

    def recommend(self, history: History, space: Space) -> Observation | None:
        """Of the trials so far the one to take, for a searcher with a model of the noise: the best loss of many is a
        lucky one. None: that with the best loss."""
        return None

    def check(self, space: Space) -> None:
        """Raises SearchError if the space cannot be searched this way."""

    def __repr__(self) -> str:
        # By which a study knows its searcher again: without an address. A dataclass has its own.
        return f"{type(self).__name__}()"

    def options(self) -> dict[str, Any]:
        """Its options in plain values."""
        return asdict(self) if is_dataclass(self) else {}


def initial(history: History, space: Space, rng: np.random.Generator, count: int) -> Settings | None:
    """Settings at random for the first ``count`` trials, which a model needs to begin with; then None."""
    return space.sample(rng) if len(history) < count else None
