"""Bayesian optimisation by a Gaussian process."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from metahpo.searchers.acquisition import ACQUISITIONS, Cube, acquisition, keys, maximised
from metahpo.searchers.base import History, Observation, Searcher, initial
from metahpo.searchers.checks import above, at_least, one_of
from metahpo.searchers.gaussian_process import NOISE, GaussianProcess, features, fit
from metahpo.searchers.space import Settings, Space


@dataclass(frozen=True)
class Bayesian(Searcher):
    """A Gaussian process learns the loss from the trials so far; the next one is where the acquisition is largest.

    acquisition: log_ei (the logarithm of the expected improvement, Ament et al. 2023), ucb (confidence bound, Srinivas
    et al. 2010), pi (probability of improvement) or batch_ei (qLogEI, which integrates over the trials at work; the
    others take these to give what the process expects). initial: trials at random before. beta: ucb's, how much an
    uncertain place is worth. noise: how much of the losses' variance is expected to be luck, before any is seen; 0.01
    is better for an objective that gives exact values.
    """

    acquisition: str = "log_ei"
    initial: int = 10
    beta: float = 2.0
    noise: float = NOISE

    def __post_init__(self) -> None:
        one_of(self, acquisition=ACQUISITIONS)
        at_least(self, initial=2)
        above(self, beta=(0, math.inf), noise=(0, 1))

    def suggest(self, history: History, space: Space, rng: np.random.Generator) -> Settings:
        if (settings := initial(history, space, rng, self.initial)) is not None:
            return settings
        if len(history.complete) < 2:
            return space.sample(rng)
        cube = Cube(space)
        told, inputs, owners, values, found = self._fitted(history, space, cube)
        gp, at_work = GaussianProcess(found, inputs, owners, values), None
        if history.pending:
            points = cube.snap(np.array([space.encode(o.settings) for o in history.pending]))
            at_work = features(space, points)[0]
            if self.acquisition != "batch_ei":
                inputs, values = np.concatenate([inputs, at_work]), np.concatenate([values, gp.expected(at_work)])
                # Taken to be exact, lest the next one be beside it.
                gp = GaussianProcess(found, inputs, owners, values, exact=len(at_work))
        # The best that is expected where trials were, free of their noise's luck.
        best = float(gp.expected(inputs).max())
        function = acquisition(self.acquisition, gp, best, self.beta, at_work, int(rng.integers(2**31)))

        def score(points: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return function(torch.as_tensor(features(space, points)[0])[:, None]).numpy()

        taken = set(keys(cube.snap(np.array([space.encode(s) for s in history.known]))))
        point = maximised(cube, score, told[np.argsort(-values[: len(told)])[:5]], rng, taken)
        return space.sample(rng) if point is None else space.decode(point)

    def recommend(self, history: History, space: Space) -> Observation | None:
        """The trial with the best mean of what it gave and what the process expects there: of the difference, half is
        taken for luck and half for what the process does not know of the setting."""
        if len(history.complete) < 3:
            return None
        _, inputs, owners, values, found = self._fitted(history, space, Cube(space))
        merits = values + GaussianProcess(found, inputs, owners, values).expected(inputs)
        complete = [(merit, -o.number, o) for merit, (o, _) in zip(merits, history.told) if o.state == "complete"]
        return max(complete)[2]

    def _fitted(self, history: History, space: Space, cube: Cube) -> tuple:
        """Of the trials that ended: points [N, D] and, for the process, inputs, owners, values and hyperparameters."""
        told = cube.snap(np.array([space.encode(o.settings) for o, _ in history.told]))
        values = transformed(np.array([loss for _, loss in history.told]), self.initial)
        inputs, owners = features(space, told)
        return told, inputs, owners, values, fit(inputs, owners, values, self.noise)


def transformed(losses: np.ndarray, first: int) -> np.ndarray:
    """Losses [N] as values to maximise, of mean 0 and deviation 1; of bad losses only that they are bad.

    Where trainings diverge losses differ by powers of ten, which would hide all differences among the good ones: those
    too far from the best one are cut off. How far that is follows from the ``first`` ones, which were drawn at random:
    the later ones crowd where it is good.
    """
    middle, best = np.median(losses[:first]), losses.min()
    # Where half of the first are as good as the best nothing says how far is too far.
    cut = np.minimum(losses, middle + 2 * (middle - best)) if middle > best else losses
    # By a power of two, which changes no digit: the squares of huge losses are not finite.
    cut = np.ldexp(cut, -np.frexp(np.abs(cut).max())[1])
    return -(cut - cut.mean()) / max(cut.std(), 1e-12)
