"""One search on a table by one of the contenders: ours and Optuna's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from zlib import crc32

import numpy as np
import torch

from metahpo.searchers import Random, Searcher, Study
from metahpo.searchers.registry import SEARCHERS
from metahpo.searchers.store import distribution
from searchers.tables import Table, load

INITIAL = 10
# How often a contender is asked, after the first, which trial it would take.
EVERY = 5
# They need more than a table of full trainings (budgets, gradients), or try all settings in turn.
UNFIT = ("grid", "gradient", "successive_halving", "hyperband", "asha", "bohb")
PEERS = ("optuna TPE", "optuna GP")
# Random search that sees each setting's mean over the seeds: its regret is known exactly.
CONTROL = "random, means seen"

Settings = dict[str, Any]


@dataclass(frozen=True)
class Race:
    """regrets: [evaluations], of the setting that a contender would take so far; seconds: [evaluations], of proposing.

    Ours say what they would take (``Study.recommended``), which the Bayesian searcher's model has a say in; Optuna's
    ``best_trial`` is that with the best loss seen.
    """

    regrets: np.ndarray
    seconds: np.ndarray


def contenders() -> list[str]:
    return [CONTROL, *(name for name in SEARCHERS if name not in UNFIT), *PEERS]


def race(table: str, contender: str, seed: int, evaluations: int, best_seen: bool = False) -> Race:
    """``evaluations`` settings of the contender's, the first ten of which are the same for all at random.

    It sees the losses of one noisy table, chosen by the seed; its regret is that of the mean over all of them.
    best_seen: whether it takes the setting with the best loss seen, whatever it would recommend.
    """
    torch.set_num_threads(1)
    found = cached(table)
    losses = found.means if contender == CONTROL else found.noisy(seed)
    rng = np.random.default_rng([seed, crc32(table.encode())])
    first = [found.space.sample(rng) for _ in range(INITIAL)]
    rows, seconds, taken = [], [], []
    search = Peer(contender, found, first, seed) if contender in PEERS else Own(contender, found, first, seed)
    for number in range(1, evaluations + 1):
        start = time.perf_counter()
        settings = search.ask()
        seconds.append(time.perf_counter() - start)
        rows.append(found.row(settings))
        search.tell(float(losses[rows[-1]]))
        if best_seen:
            taken.append(int(np.argmin(losses[rows])))
            continue
        taken.append(search.taken() if number <= INITIAL or number % EVERY == 0 else taken[-1])
    return Race(found.regrets[rows][taken], np.array(seconds))


cached: Callable[[str], Table] = lru_cache(2)(load)


class Own:
    """One of our searchers."""

    def __init__(self, name: str, table: Table, first: list[Settings], seed: int):
        searcher: Searcher = Random() if name == CONTROL else SEARCHERS[name]()
        self.study, self.first = Study(table.space, searcher, seed=seed), first

    def ask(self) -> Settings:
        count = len(self.study.trials)
        self.trial = self.study.ask(self.first[count] if count < len(self.first) else None)
        return self.trial.settings

    def tell(self, loss: float) -> None:
        self.study.tell(self.trial, loss)

    def taken(self) -> int:
        """The number of the trial that it would take."""
        assert self.study.recommended is not None
        return self.study.recommended.number


class Peer:
    """One of Optuna's samplers."""

    def __init__(self, name: str, table: Table, first: list[Settings], seed: int):
        import warnings

        import optuna

        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        kind = {"optuna TPE": optuna.samplers.TPESampler, "optuna GP": optuna.samplers.GPSampler}[name]
        self.study = optuna.create_study(sampler=kind(seed=seed, n_startup_trials=INITIAL))
        self.distributions = {key: distribution(setting) for key, setting in table.space.settings.items()}
        for settings in first:
            self.study.enqueue_trial(settings)

    def ask(self) -> Settings:
        self.trial = self.study.ask(self.distributions)
        return self.trial.params

    def tell(self, loss: float) -> None:
        self.study.tell(self.trial, loss)

    def taken(self) -> int:
        return self.study.best_trial.number
