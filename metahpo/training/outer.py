"""The outer optimizer's parameters and state, by the names that the parameters have in the learner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from metahpo.errors import CheckpointError, one_line
from metahpo.functional import Params
from metahpo.functional.surgery import current_names
from metahpo.learners.base import MetaLearner
from metahpo.training.checkpoint import State


class Freed:
    """Gives an optimizer the parameters that were set free, or put in, after it was made.

    Others that it lacks are left out on purpose.
    """

    def __init__(self, learner: MetaLearner):
        self._known = {id(p): p for p in learner.outer_params().values()}

    def add_to(self, optimizer: torch.optim.Optimizer, params: Params) -> None:
        """Adds those of ``params`` that are new to its first group."""
        new = {id(p): p for p in params.values() if id(p) not in self._known}
        if new:
            self._known |= new
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            optimizer.param_groups[0]["params"] += [p for key, p in new.items() if key not in held]


def optimizer_names(optimizer: torch.optim.Optimizer, learner: MetaLearner) -> list[str]:
    """The names of the optimizer's parameters, in its order; "" for one that is not the learner's."""
    names = {id(p): name for name, p in learner.named_parameters()}
    return [names.get(id(p), "") for group in optimizer.param_groups for p in group["params"]]


def load_optimizer(optimizer: torch.optim.Optimizer, learner: MetaLearner, state: State, path: Path) -> None:
    """Gives each parameter the state that the one of its name had in the checkpoint.

    Raises:
        CheckpointError: If the checkpoint's optimizer has other parameters or groups.
    """
    saved = state["optimizer"]
    names = _names_of(saved, learner, state)
    try:
        if names is not None:
            params = dict(learner.named_parameters())
            group = optimizer.param_groups[0]["params"]
            held = {id(p) for p in group}
            # What had been set free may not be yet.
            group += [params[name] for name in names if id(params[name]) not in held]
            place = {name: i for i, name in enumerate(optimizer_names(optimizer, learner))}
            saved = {
                "state": {place[names[i]]: values for i, values in saved["state"].items()},
                "param_groups": [{**saved["param_groups"][0], "params": [*range(len(place))]}],
            }
        optimizer.load_state_dict(saved)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path} does not fit the learner: optimizer: {one_line(error)}") from error


def _names_of(saved: dict[str, Any], learner: MetaLearner, state: State) -> list[str] | None:
    """The names in the checkpoint's order; None where they are not known, or there is more than one group."""
    if len(saved["param_groups"]) > 1:
        return None
    names = state.get("optimizer_names")
    if names is None:  # Of the version before, whose optimizer had what was learnt in the learner's order.
        outer = learner.outer_params()
        names = [name for name in current_names(learner, state["learner"]) if name in outer]
    return names if len(names) == len(saved["param_groups"][0]["params"]) and "" not in names else None
