"""The errors that metahpo raises on purpose: a message is one line that names what was found and what was expected."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class MetaHPOError(Exception):
    """Base of every error raised on purpose; the command line prints its message alone and exits with 2."""


class ConfigError(MetaHPOError):
    """A configuration that cannot be run; the message lists every offending key."""


class UsageError(ConfigError):
    """A wrong command line."""


class DataError(MetaHPOError):
    """A data set that is missing, damaged or too small for the tasks asked of it."""


class NetError(MetaHPOError):
    """A net that cannot be used as asked: wrong output shape, lazy modules, checkpointed blocks, an unfit engine."""


class HypergradientError(MetaHPOError):
    """A hypergradient that cannot be had as asked: a captured hyperparameter, a loss that is no scalar."""


class SearchError(MetaHPOError):
    """A search that cannot be run as asked: a bad space, a study file of another one, a searcher unfit for it."""


class CheckpointError(MetaHPOError):
    """A checkpoint that is damaged, holds code, or does not fit the learner."""


class NonFiniteError(MetaHPOError):
    """A loss or gradient that became NaN or infinite; the message names the iteration and the task."""


class RankError(MetaHPOError):
    """Another process of a training by several has gone."""


class ArgumentError(MetaHPOError, ValueError):
    """An argument that cannot be meant: the message names it, what was found and what was expected."""


class ConfigArgumentError(ConfigError, ArgumentError):
    """An argument that a configuration or settings could have named too."""


class DataArgumentError(DataError, ArgumentError):
    """An argument of a source of tasks or data."""


class NetArgumentError(NetError, ArgumentError):
    """An argument of a net, learner or update rule."""


class HypergradientArgumentError(HypergradientError, ArgumentError):
    """An argument of a strategy or solver."""


class StudyFileError(SearchError):
    """A study's database cannot be read or written: it is full, locked, damaged or gone."""


class SearchArgumentError(SearchError, ArgumentError):
    """An argument of a search: of a space, a searcher or a study."""


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that memory ran out: on a GPU, or by torch's allocator on the CPU."""
    while error is not None:
        if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in str(error):
            return True
        error = error.__cause__
    return False


def one_line(error: object, length: int = 300) -> str:
    """What an error (or anything) says, in one line, without the C++ frames that torch may append."""
    return " ".join(str(error).partition("Exception raised from")[0].split())[:length]


def shown(value: object, length: int = 80) -> str:
    """A value as a message shows it: in one line and cut; tensors, arrays and other large things by their kind."""
    kind = type(value).__name__
    shape = getattr(value, "shape", None)
    if shape is not None and shape != ():
        return f"{kind} of shape {tuple(shape)}"
    try:
        item = value.item() if shape == () else value  # type: ignore[attr-defined]
        text = " ".join(_brief.repr(item).split())
    except Exception:  # A foreign object's own repr; a tensor without a value.
        return kind
    if text.startswith("<"):
        return kind
    return text if len(text) <= length else f"{text[: length - 3]}..."


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 60


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known one, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name[:100], known, 1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
