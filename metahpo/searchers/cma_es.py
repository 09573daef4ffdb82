"""CMA-ES."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cmaes import CMA, CatCMAwM

from metahpo.searchers.base import History, Proposal, Searcher, initial
from metahpo.searchers.checks import above, at_least
from metahpo.searchers.moves import DRAWS
from metahpo.searchers.settings import Choice
from metahpo.searchers.space import Settings, Space, key

NOTE = "cma_es"
# A stepped range of more values than this is as good as continuous.
MANY = 100


@dataclass(frozen=True)
class CMAES(Searcher):
    """Covariance matrix adaptation, by the package cmaes, in the unit cube.

    Continuous spaces: CMA-ES (Hansen 2016). Spaces with stepped numbers or choices: CatCMA with margin (Hamano et al.
    2025), which gives each choice a distribution of its own and keeps every value likely enough to come again. A
    setting that does not exist in a trial keeps its coordinate, which then has no effect.

    The first ``initial`` trials are random; the search begins at the best of them (0: at the centre) with standard
    deviation ``sigma``. population: at least 4, or 0 for the package's own, 4 + 3 ln(settings). When it has converged
    it begins anew at a random point with twice the population (IPOP: Auger and Hansen 2005). A generation is the next
    ``population`` trials that have ended, by number, so no worker waits: a few may be of the distribution before.
    Settings that were tried already are drawn again a few times.
    """

    sigma: float = 0.2
    population: int = 0
    initial: int = 10

    def __post_init__(self) -> None:
        # Fewer have but one parent, and nothing to adapt the covariance to.
        at_least(self, initial=0, population=0)
        at_least(self, population=4 if self.population else 0)
        above(self, sigma=(0, 10))

    def suggest(self, history: History, space: Space, rng: np.random.Generator) -> Settings | Proposal:
        runs = [o.notes[NOTE] for o in history if NOTE in o.notes]
        first = initial(history, space, rng, self.initial)
        if not runs and first is not None:
            return first
        run = runs[-1]["run"] if runs else 0
        mean = runs[-1]["mean"] if runs else _centre(history, space)
        if all(setting.count == 1 for setting in space.settings.values()):
            return space.sample(rng)
        strategy = self._strategy(space, run, mean)
        strategy.replay([(o.notes[NOTE], v) for o, v in history.told if o.notes.get(NOTE, {}).get("run") == run])
        if strategy.converged:
            run, mean = run + 1, list(rng.random(len(space)))
            strategy = self._strategy(space, run, mean)
        strategy.seed(int(rng.integers(2**32)))
        tried = history.tried
        settings, point = strategy.ask()
        for _ in range(DRAWS):
            if key(settings) not in tried:
                break
            settings, point = strategy.ask()
        return Proposal(settings, notes={NOTE: {"run": run, "mean": mean, **point}})

    def _strategy(self, space: Space, run: int, mean: list[float]) -> _Strategy:
        """The run's, which was kept if the last suggestion was of it, too: it has seen most of the generations."""
        of = (repr(space), run, mean)
        if self.__dict__.get("_kept", (None,))[0] != of:
            self.__dict__["_kept"] = of, _Strategy(space, mean, self.sigma, self.population, 2**run)
        return self.__dict__["_kept"][1]


def _centre(history: History, space: Space) -> list[float]:
    """Where the first run begins."""
    told = [(loss, o.number, o.settings) for o, loss in history.told]
    best = min(told, key=lambda t: t[:2])[2] if told else {}
    return [float(u) for u in space.encode(best)]


class _Strategy:
    """One run over the coordinates that have more than one value; ``mean`` [D] is in the unit cube of the space."""

    def __init__(self, space: Space, mean: Sequence[float], sigma: float, population: int, times: int):
        self.space, self.mean, self.sigma = space, mean, sigma
        free = {name: setting for name, setting in space.settings.items() if setting.count > 1}
        self.choices = [name for name, setting in free.items() if isinstance(setting, Choice)]
        self.stepped = [n for n, setting in free.items() if n not in self.choices and setting.count <= MANY]
        self.smooth = [name for name in free if name not in (*self.choices, *self.stepped)]
        self.size = times * (population or 4 + math.floor(3 * math.log(len(free))))
        self._begin()

    def _begin(self) -> None:
        self._told: list[tuple[Mapping[str, Any], float]] = []
        at = dict(zip(self.space, self.mean))
        start = np.array([at[name] for name in (*self.smooth, *self.stepped)])
        if not self.stepped and not self.choices:
            bounds = np.tile([0.0, 1.0], (len(start), 1))
            self._model: CMA | CatCMAwM = CMA(start, self.sigma, bounds, population_size=self.size, seed=0)
        else:
            places = [[self.space[name].unit(v) for v in self.space[name].values()] for name in self.stepped]
            self._model = CatCMAwM(
                [[0.0, 1.0]] * len(self.smooth) or None,
                places or None,
                self._counts or None,
                population_size=self.size,
                mean=start if len(start) else None,
                sigma=self.sigma,
                cov=np.eye(len(start)) if len(start) else None,
                seed=0,
            )

    @property
    def _counts(self) -> list[int]:
        return [int(self.space[name].count) for name in self.choices]

    @property
    def converged(self) -> bool:
        # The package has no such test for choices alone.
        return bool(self.smooth or self.stepped) and self._model.should_stop()

    def seed(self, seed: int) -> None:
        self._model.reseed_rng(seed)

    def ask(self) -> tuple[Settings, dict[str, Any]]:
        """Settings, and the point that the strategy is told of them by."""
        units, given = dict(zip(self.space, self.mean)), self._model.ask()
        if isinstance(given, np.ndarray):
            units |= dict(zip(self.smooth, given))
            return self.space.decode(np.array(list(units.values()))), {"x": given.tolist()}
        point: dict[str, Any] = {}
        if given._v_raw is not None:
            numbers = [values for values in (given.x, given.z) if values is not None]
            units |= dict(zip((*self.smooth, *self.stepped), np.concatenate(numbers)))
            point["x"] = given._v_raw.tolist()
        if given.c is not None:
            places = np.argmax(given.c, 1)
            units |= {name: (place + 0.5) / n for name, place, n in zip(self.choices, places, self._counts)}
            point["c"] = places.tolist()
        return self.space.decode(np.array(list(units.values()))), point

    def replay(self, told: list[tuple[Mapping[str, Any], float]]) -> None:
        """Tells it all whole generations."""
        told = told[: len(told) // self.size * self.size]
        if told[: len(self._told)] != self._told:
            self._begin()
        with warnings.catch_warnings():
            # Its penalty for equal losses is the median of nothing, and has no effect.
            warnings.simplefilter("ignore", RuntimeWarning)
            for start in range(len(self._told), len(told), self.size):
                self._model.tell([(self._point(point), loss) for point, loss in told[start : start + self.size]])
        self._told = told

    def _point(self, point: Mapping[str, Any]) -> Any:
        x = np.array(point["x"]) if "x" in point else None
        if isinstance(self._model, CMA):
            return x
        c = np.eye(max(self._counts), dtype=bool)[point["c"]] if "c" in point else None
        return CatCMAwM.Solution(c=c, _v_raw=x)
