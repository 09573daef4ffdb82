"""Spaces and objectives that searchers are checked on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from metahpo.searchers.outcome import Outcome
from metahpo.searchers.settings import Choice, Float, Int, Setting
from metahpo.searchers.space import Space
from metahpo.searchers.trial import Trial

CONTINUOUS = Space(rate=Float(1e-4, 1, log=True), decay=Float(-1, 1))
MIXED = Space(
    rate=Float(1e-5, 1e2, log=True),
    decay=Float(-3, 0.5),
    share=Float(0, 1, step=0.1),
    width=Int(1, 100, log=True),
    steps=Int(-2, 5),
    batch=Int(4, 30, step=4),
    rule=Choice("sgd", "adam", "none"),
)
# Options that are easily taken for one another.
STEPPED = Space(odd=Choice(1, 1.0, True, None, "1", [1, 2], {"a": [1]}), share=Float(0, 1, step=0.1), steps=Int(0, 3))
CONDITIONAL = Space(
    rate=Float(1e-4, 1, log=True),
    rule=Choice("sgd", "adam"),
    momentum=Float(0, 1, when={"rule": "sgd"}),
    nesterov=Choice(True, False, when={"rule": "sgd"}),
    damping=Float(0, 1, step=0.25, when={"nesterov": True}),
    beta=Float(0.5, 0.999, when={"rule": "adam"}),
    layers=Int(1, 3),
    filters=Int(8, 64, log=True, when={"layers": [2, 3], "rule": "adam"}),
)
CONDITIONAL_STEPPED = Space(
    # The one that others depend on comes last.
    damping=Float(0, 1, step=0.25, when={"nesterov": True}),
    nesterov=Choice(True, False, when={"rule": "sgd"}),
    beta=Float(0.5, 0.9, step=0.1, when={"rule": ["adam", "lion"]}),
    layers=Int(1, 3),
    rule=Choice("sgd", "adam", "lion"),
)
TINY = Space(rule=Choice("sgd", "adam"), layers=Int(1, 3))
ONE = Space(rate=Float(1e-3, 1, log=True))
# No coordinate has a second value.
FIXED = Space(rule=Choice("sgd"))

Objective = Callable[[Trial], Any]


def bowl(space: Space) -> Objective:
    """Lowest, 0, where each setting is at 0.3 of its range; 1 / budget higher for a training that is cut short."""

    def objective(trial: Trial) -> Outcome:
        units = {name: space[name].unit(value) for name, value in trial.settings.items()}
        slopes = {name: _slope(space[name], trial[name]) for name in units}
        loss = sum((unit - 0.3) ** 2 for unit in units.values()) + (1 / trial.budget if trial.budget else 0.0)
        return Outcome(loss, {name: 2 * (units[name] - 0.3) * slope for name, slope in slopes.items() if slope})

    return objective


def _slope(setting: Setting, value: Any) -> float:
    """How fast a number's place in its range changes with it; 0 for one that has no gradient."""
    if not isinstance(setting, Float) or setting.step is not None:
        return 0.0
    return 1 / (value * math.log(setting.high / setting.low)) if setting.log else 1 / (setting.high - setting.low)


def failing(space: Space) -> Objective:
    """The bowl, but every third trial raises, and every fifth gives NaN."""
    good = bowl(space)

    def objective(trial: Trial) -> Any:
        if trial.number % 3 == 1:
            raise ValueError("a trial that fails")
        return math.nan if trial.number % 5 == 2 else good(trial)

    return objective


def hopeless(trial: Trial) -> float:
    """Every trial fails, the first ones too."""
    return math.nan


def flat(trial: Trial) -> float:
    """Every trial is as good as the others."""
    return 0.25


def extreme(trial: Trial) -> float:
    """Losses of which a sum of squares is not a number, beside some that are almost equal."""
    return (1e30, -1e30, 1e200, 1e-30, -1e-30, 0.0, -1e200)[trial.number % 7]


def two(space: Space) -> Objective:
    """Two objectives, one of which grows as the other falls."""
    good = bowl(space)
    return lambda trial: (loss := good(trial).score, 1 / (1 + loss))
