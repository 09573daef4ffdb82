"""Tree-structured Parzen estimator."""

from __future__ import annotations

import math
import warnings
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from metahpo.searchers.base import History, Searcher, initial
from metahpo.searchers.checks import at_least, flag
from metahpo.searchers.settings import Choice, Setting
from metahpo.searchers.space import Settings, Space
from metahpo.searchers.store import distribution

# A range of more steps than this is searched as the unit interval.
MANY = 10**6


@dataclass(frozen=True)
class TPE(Searcher):
    """The tree-structured Parzen estimator (Bergstra et al. 2011), by Optuna's ``TPESampler``: the likeliest of
    ``candidates`` draws to be among the good trials rather than the others.

    multivariate: one density for all settings that exist together (Falkner et al. 2018), else one for each. Trials at
    work count as bad ones, failed ones as the worst. The first ``initial`` trials are random.
    """

    initial: int = 10
    candidates: int = 24
    multivariate: bool = True

    def __post_init__(self) -> None:
        at_least(self, initial=0, candidates=1)
        flag(self, "multivariate")

    def suggest(self, history: History, space: Space, rng: np.random.Generator) -> Settings:
        first = initial(history, space, rng, self.initial)
        if first is not None or not history.told:
            return first or space.sample(rng)
        trial = self._study(history, space, int(rng.integers(2**32))).ask()
        settings: Settings = {}
        # What has been chosen decides what else exists.
        while left := [name for name in space.active(settings) if name not in settings]:
            settings[left[0]] = _suggested(trial, left[0], space[left[0]])
        return {name: settings[name] for name in space if name in settings}

    def _study(self, history: History, space: Space, seed: int) -> optuna.Study:
        """The trials so far as a study of Optuna's, in memory."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=1,
                n_ei_candidates=self.candidates,
                seed=seed,
                multivariate=self.multivariate,
                group=self.multivariate,
                constant_liar=True,
            )
        losses = {o.number: loss for o, loss in history.told}
        distributions = {name: _distribution(setting) for name, setting in space.settings.items()}
        trials = []
        # The trial that is asked for is number 0, the only one that the storage itself makes.
        for number, observation in enumerate(history, 1):
            loss = losses.get(observation.number)
            trials.append(
                FrozenTrial(
                    number=number,
                    trial_id=number,
                    state=TrialState.RUNNING if loss is None else TrialState.COMPLETE,
                    value=loss,
                    datetime_start=None,
                    datetime_complete=None,
                    params={n: _parameter(space[n], value) for n, value in observation.settings.items()},
                    distributions={name: distributions[name] for name in observation.settings},
                    user_attrs={},
                    system_attrs={},
                    intermediate_values={},
                )
            )
        return optuna.create_study(storage=_Storage(trials), sampler=sampler)


class _Storage(InMemoryStorage):
    """One that has these trials from the start: to add them one by one would cost more than all the rest."""

    def __init__(self, trials: list[FrozenTrial]):
        super().__init__()
        self._there = trials

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        there = [trial for trial in self._there if states is None or trial.state in states]
        return there + super().get_all_trials(study_id, deepcopy, states)


def _distribution(setting: Setting) -> BaseDistribution:
    # By place, for Optuna takes 1, 1.0 and true for one option.
    if isinstance(setting, Choice):
        return CategoricalDistribution(range(len(setting.options)))
    return FloatDistribution(0.0, 1.0) if _fine(setting) else distribution(setting)


def _fine(setting: Setting) -> bool:
    """Whether it has so many steps that Optuna's own densities of them have no digits left."""
    return MANY < setting.count < math.inf


def _parameter(setting: Setting, value: Any) -> Any:
    if isinstance(setting, Choice):
        return setting.index(value)
    return setting.unit(value) if _fine(setting) else value


def _suggested(trial: optuna.Trial, name: str, setting: Setting) -> Any:
    if isinstance(setting, Choice):
        return setting.options[trial.suggest_categorical(name, range(len(setting.options)))]
    kind = _distribution(setting)
    if _fine(setting):
        return setting.at(trial.suggest_float(name, 0.0, 1.0))
    if isinstance(kind, IntDistribution):
        return trial.suggest_int(name, kind.low, kind.high, step=kind.step, log=kind.log)
    assert isinstance(kind, FloatDistribution)
    value = trial.suggest_float(name, kind.low, kind.high, step=kind.step, log=kind.log)
    # Written as the setting writes it: 0.3, where Optuna has 0.30000000000000004.
    return value if setting.step is None else setting.at(setting.unit(value))
