"""Search by the gradient of the score, as far as the objective tells it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from metahpo.errors import SearchArgumentError
from metahpo.searchers.base import History, Observation, Proposal, Searcher
from metahpo.searchers.checks import above, at_least, fraction
from metahpo.searchers.descent import Descent
from metahpo.searchers.random import Random
from metahpo.searchers.settings import Float, Int, Setting
from metahpo.searchers.space import Settings, Space

# The notes of a trial say which chain of descent it belongs to.
CHAIN, HOP = "chain", "hop"


@dataclass(frozen=True)
class Gradient(Searcher):
    """Descends from the best of some starts by the gradients that the objective gives (``Outcome.gradients``).

    base: the searcher of the starts, and of all settings without a gradient: a chain of trials keeps those of its
    start. The base sees the starts alone, each with the best loss that its chain has come to. starts: how many trials
    it gives before the best of them is gone on from. Where no trial has a gradient, all are the base's.

    A chain moves its numbers with a gradient in the unit cube of the space, log ranges in the logarithm, by a trust
    region with the curvature learnt on the way (``Descent``), at first by ``radius`` of each range. It is over when its
    steps are shorter than ``shortest``, when no more than ``tolerance`` of the loss, or of its gain so far, can be
    expected of a step, or when it is worse than another one after ``patience`` trials. Then the next best start is gone
    on from, or there is a new one; and up to a share of ``hops`` of all trials are draws near the best one, for close
    up the loss of a training is rough, where no gradient leads (basin hopping, Wales and Doye 1997). With several
    workers as many chains go on at once. Of several objectives it descends the first.
    """

    base: Searcher = Random()
    starts: int = 3
    radius: float = 0.15
    shortest: float = 0.004
    tolerance: float = 1e-3
    patience: int = 10
    hops: float = 0.2

    def __post_init__(self) -> None:
        at_least(self, starts=1, patience=1)
        above(self, shortest=(0, 0.5), radius=(0, 0.5))
        fraction(self, "tolerance", "hops")
        if not 0 < self.shortest < self.radius <= 0.5:
            raise SearchArgumentError(
                "Gradient: expected 0 < shortest < radius <= 0.5 (shares of each range), found "
                f"shortest={self.shortest!r}, radius={self.radius!r}"
            )
        if not 0 <= self.hops < 1:
            raise SearchArgumentError(f"Gradient: hops should be a share from 0 to below 1, found {self.hops!r}")
        if not isinstance(self.base, Searcher):
            raise SearchArgumentError(f"Gradient: base should be a searcher, found {self.base!r}")

    def check(self, space: Space) -> None:
        self.base.check(space)

    def suggest(self, history: History, space: Space, rng: np.random.Generator) -> Proposal | None:
        chains = self._chains(history, space)
        if len(chains) >= self.starts:
            best = min(chain.loss for chain in chains)
            hops = sum(HOP in trial.notes for trial in history)
            at_work = [trial.settings for trial in history.pending]
            for chain in self._ready(chains, best):
                notes, settings = {CHAIN: chain.number}, chain.next()
                if settings is None and chain.loss == best and hops < self.hops * len(history):
                    notes, settings = {**notes, HOP: True}, chain.hop(rng)
                # Two chains may be on their way into the same corner.
                if settings is not None and settings not in at_work:
                    return Proposal(settings, budget=chain.trials[0].budget, notes=notes)
        given = self.base.suggest(History([chain.told() for chain in chains], history.known), space, rng)
        if given is None:
            return None
        proposal = given if isinstance(given, Proposal) else Proposal(given)
        return replace(proposal, notes={**proposal.notes, CHAIN: len(history)})

    def _chains(self, history: History, space: Space) -> list[_Chain]:
        """All chains, by their starts; a trial of other origin is a start too."""
        trials: dict[int, list[Observation]] = {}
        for trial in history:
            trials.setdefault(trial.notes.get(CHAIN, trial.number), []).append(trial)
        return [_Chain(number, members, space, self) for number, members in trials.items()]

    def _ready(self, chains: list[_Chain], best: float) -> Iterator[_Chain]:
        """Those that may go on, the best first."""
        for chain in sorted(chains, key=lambda chain: (chain.loss, chain.number)):
            behind = chain.loss > best and len(chain.trials) >= self.patience
            if not behind and all(trial.state != "pending" for trial in chain.trials):
                yield chain


@dataclass
class _Chain:
    """A start and the trials that went on from it, by number."""

    number: int
    trials: list[Observation]
    space: Space
    options: Gradient

    @property
    def loss(self) -> float:
        return min((o.losses[0] for o in self.trials if o.losses), default=math.inf)

    def told(self) -> Observation:
        """The start with the best that was found from it."""
        start = self.trials[0]
        if start.state != "complete":
            return start
        best = min((o for o in self.trials if o.loss is not None), key=lambda o: o.loss or 0.0)
        return replace(start, losses=best.losses, loss=best.loss)

    def next(self) -> Settings | None:
        """Where the descent goes on; None where there is no gradient or it is over."""
        return None if (descent := self._descent) is None else self._at(descent.next())

    def hop(self, rng: np.random.Generator) -> Settings | None:
        """A place at random near the best one."""
        if (descent := self._descent) is None:
            return None
        length = self.options.radius / math.sqrt(len(self._moving))
        return self._at(descent.point + length * rng.normal(size=len(self._moving)))

    def _at(self, point: np.ndarray | None) -> Settings | None:
        if point is None:
            return None
        moved = {name: self.space[name].at(float(u)) for name, u in zip(self._moving, point.clip(0, 1))}
        settings = {**self.trials[0].settings, **moved}
        # Where steps are whole numbers a shorter one may be none.
        return None if any(trial.settings == settings for trial in self.trials) else settings

    @cached_property
    def _descent(self) -> Descent | None:
        start, slope = self.trials[0], self._slope(self.trials[0])
        if slope is None or not start.losses:
            return None
        options = self.options
        descent = Descent(
            self._point(start),
            start.losses[0],
            slope,
            radius=options.radius,
            shortest=options.shortest,
            grain=np.array([1 / self.space[name].count for name in self._moving]),
            tolerance=options.tolerance,
        )
        for trial in self.trials[1:]:
            descent.see(self._point(trial), trial.losses[0] if trial.losses else None, self._slope(trial))
        return descent

    @cached_property
    def _moving(self) -> list[str]:
        """The numbers that the start has a gradient for; one that others depend on stays as it is."""
        fixed = {other for setting in self.space.settings.values() for other in setting.when}
        gradients, settings = self.trials[0].gradients, self.trials[0].settings
        return [
            name
            for name in settings
            if name in gradients and name not in fixed and isinstance(self.space[name], (Float, Int))
        ]

    def _point(self, trial: Observation) -> np.ndarray:
        return np.array([self.space[name].unit(trial.settings[name]) for name in self._moving])

    def _slope(self, trial: Observation) -> np.ndarray | None:
        """The gradient in the unit cube; None where a part is missing or infinite."""
        if not self._moving or any(name not in trial.gradients for name in self._moving):
            return None
        parts = [trial.gradients[name] * stretch(self.space[name], trial.settings[name]) for name in self._moving]
        return np.array(parts) if np.isfinite(parts).all() else None


def stretch(setting: Setting, value: float) -> float:
    """The derivative of a number's value in its place in the unit interval (of the straight line through its steps)."""
    assert isinstance(setting, (Float, Int))
    half = 0.5 if isinstance(setting, Int) else 0.0
    if setting.log:
        return value * math.log((setting.high + half) / (setting.low - half))
    step = setting.step or (1 if isinstance(setting, Int) else None)
    return setting.high - setting.low if step is None else step * setting.count
