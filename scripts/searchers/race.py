"""One search on a table by one of the contenders: ours and Optuna's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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
# They need more than a table of full trainings (budgets, gradients), or try all settings in turn.
UNFIT = ("grid", "gradient", "successive_halving", "hyperband", "asha", "bohb")
PEERS = ("optuna TPE", "optuna GP")
# Random search that sees each setting's mean over the seeds: its regret is known exactly.
CONTROL = "random, means seen"

Settings = dict[str, Any]
# From the loss of the last settings (None at first) to the next ones.
Proposals = Iterator[Settings]


@dataclass(frozen=True)
class Race:
    """regrets: [evaluations], of the setting with the best loss seen so far; seconds: [evaluations], of proposing."""

    regrets: np.ndarray
    seconds: np.ndarray


def contenders() -> list[str]:
    return [CONTROL, *(name for name in SEARCHERS if name not in UNFIT), *PEERS]


def race(table: str, contender: str, seed: int, evaluations: int) -> Race:
    """``evaluations`` settings of the contender's, the first ten of which are the same for all at random.

    It sees the losses of one noisy table, chosen by the seed; its regret is that of the mean over all of them.
    """
    torch.set_num_threads(1)
    found = cached(table)
    losses = found.means if contender == CONTROL else found.noisy(seed)
    rng = np.random.default_rng([seed, crc32(table.encode())])
    first = [found.space.sample(rng) for _ in range(INITIAL)]
    rows, seconds = [], []
    propose = peer(contender, found, first, seed) if contender in PEERS else own(contender, found, first, seed)
    loss = None
    for _ in range(evaluations):
        start = time.perf_counter()
        settings = propose(loss)
        seconds.append(time.perf_counter() - start)
        rows.append(found.row(settings))
        loss = float(losses[rows[-1]])
    seen = losses[rows]
    best = [int(np.argmin(seen[: i + 1])) for i in range(evaluations)]
    return Race(found.regrets[rows][best], np.array(seconds))


cached: Callable[[str], Table] = lru_cache(2)(load)


def own(name: str, table: Table, first: list[Settings], seed: int) -> Callable[[float | None], Settings]:
    searcher: Searcher = Random() if name == CONTROL else SEARCHERS[name]()
    study, asked = Study(table.space, searcher, seed=seed), []

    def propose(loss: float | None) -> Settings:
        if loss is not None:
            study.tell(asked[-1], loss)
        asked.append(study.ask(first[len(asked)] if len(asked) < len(first) else None))
        return asked[-1].settings

    return propose


def peer(name: str, table: Table, first: list[Settings], seed: int) -> Callable[[float | None], Settings]:
    import warnings

    import optuna

    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = optuna.samplers
    kinds = {
        "optuna TPE": lambda: samplers.TPESampler(seed=seed, n_startup_trials=INITIAL),
        "optuna GP": lambda: samplers.GPSampler(seed=seed, n_startup_trials=INITIAL),
    }
    study, asked = optuna.create_study(sampler=kinds[name]()), []
    distributions = {key: distribution(setting) for key, setting in table.space.settings.items()}
    for settings in first:
        study.enqueue_trial(settings)

    def propose(loss: float | None) -> Settings:
        if loss is not None:
            study.tell(asked[-1], loss)
        asked.append(study.ask(distributions))
        return asked[-1].params

    return propose
