"""What a step depends on beside tensors: attributes of modules, and Python's and NumPy's random numbers."""

from __future__ import annotations

import types
from collections.abc import Callable
from operator import itemgetter
from typing import Any

from torch import nn

from metahpo.functional import FunctionalModule, PerStepBatchNorm
from metahpo.inner.randomness import python_draws

_KINDS = (bool, int, float, complex, str, bytes, tuple, list, dict, set, type(None), types.FunctionType, type)
_INTERNAL = {*vars(nn.Module())}
# What FunctionalModule sets in a batch norm before a call.
_OF_A_CALL = {"step", "inductive", "frozen_statistics"}


class PythonState:
    """The plain attributes of a learner's modules as they are now, to see whether they change.

    Those of metahpo's own layers, which say how a call is to run, are left out, and so are tensors.
    """

    def __init__(self, learner: nn.Module):
        self._kept: list[tuple[str, dict[str, Any], list[str], Callable[[Any], Any], tuple[Any, ...]]] = []
        for name, module in learner.named_modules():
            if isinstance(module, FunctionalModule):
                continue
            skipped = _INTERNAL | _OF_A_CALL if isinstance(module, PerStepBatchNorm) else _INTERNAL
            values = {k: v for k, v in vars(module).items() if k not in skipped and isinstance(v, _KINDS)}
            if values:
                # Twice, as itemgetter gives a tuple for two and more.
                names = [*values, next(iter(values))]
                held = tuple(v.copy() if isinstance(v, (list, dict, set)) else v for v in map(values.get, names))
                self._kept.append((name, vars(module), names, itemgetter(*names), held))

    def changed(self, of: tuple[type, ...] = (object,)) -> str | None:
        """The first attribute, of those kinds of values, that is not as it was, with its module; None: all are."""
        for name, now, names, getter, held in self._kept:
            try:
                if getter(now) == held:
                    continue
            except Exception:  # A key is gone, or a tensor took a number's place.
                pass
            for key, old in zip(names, held):
                if isinstance(old, of) and not _equal(now.get(key), old):
                    return f"{key!r} of {shown(name)}"
        return None


def _equal(new: Any, old: Any) -> bool:
    try:
        return bool(new == old)
    except Exception:
        return False


class Watch:
    """Whether a piece of code that ran since changed what Python alone keeps."""

    def __init__(self, learner: nn.Module):
        self._state, self._draws = PythonState(learner), python_draws()

    def drew(self) -> bool:
        """Whether numbers were drawn from ``random`` or ``numpy.random``."""
        return self._draws != python_draws()

    def changed(self) -> str | None:
        return self._state.changed()

    def counted(self) -> str | None:
        """As ``changed``, of numbers that were numbers before: what a first call sets up is none."""
        return self._state.changed(of=(int, float))


def shown(name: str) -> str:
    """A module of the learner as its user knows it."""
    short = name.removeprefix("module.net").removeprefix(".")
    return f"module {short!r}" if short else "the net" if name else "the learner"
