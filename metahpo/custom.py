"""The user's own code, MODULE:ATTRIBUTE of a config: found, called, and tried before any work."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from metahpo.errors import ConfigError, DataError, MetaHPOError, one_line, out_of_memory
from metahpo.learners import MetaLearner, Phase
from metahpo.tasks import Task, TaskSource
from metahpo.training.engines import ENGINES
from metahpo.training.environment import seeded
from metahpo.training.precision import precision
from metahpo.training.settings import TrainingSettings

# Labels that torch's cross entropy passes over.
IGNORED = -100


def check_learner(
    learner: MetaLearner, name: str, train: TaskSource, evaluation: TaskSource, settings: TrainingSettings
) -> None:
    """Raises NetError or ConfigError unless the learner trains and evaluates on a task, as the settings say."""
    # One task tells nothing of an engine's speed, and is not what a program is to be recorded from.
    tried = {"auto": "loop", "trace": "vmap", "graph": "vmap"}.get(settings.engine, settings.engine)
    device, engine = settings.torch_device(), ENGINES[tried]()
    learner.to(device)
    try:
        with seeded(settings.seed, device=device), precision(learner, settings):
            losses = engine.meta_gradient(learner, train.batch([0]).to(device), learner.training_phase(0)).losses
            engine.evaluate(learner, evaluation.batch([0]).to(device), Phase())
    except MetaHPOError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ConfigError(f"learner.name: {name} fails on a task: {brief(error)}") from error
    if losses.shape != (1,):
        raise ConfigError(f"learner.name: {name} gives the loss {list(losses.shape[1:])} for a task, expected a scalar")


def check_source(source: Any, where: str, count: int) -> None:
    """Raises ConfigError or DataError unless the user's source gives tasks 0 and ``count`` - 1, alone and batched."""
    if not isinstance(source, TaskSource):
        raise ConfigError(f"{where}: found {type(source).__name__}, expected a TaskSource")
    for index in dict.fromkeys([0, count - 1]):
        try:
            task, batch = source.task(index), source.batch([index])
        except MetaHPOError:
            raise
        except Exception as error:
            raise DataError(f"{where}: task {index} of {count} fails: {brief(error)}") from error
        for method, found in (("task", task), ("batch", batch)):
            if not isinstance(found, Task) or not all(isinstance(t, torch.Tensor) for t in found):
                raise DataError(f"{where}: {method}({index}) gave {type(found).__name__}, expected a Task of tensors")
        if problem := _problem(task):
            raise DataError(f"{where}: task {index}: {problem}")
        if [t.shape for t in batch] != [(1, *t.shape) for t in task]:
            raise DataError(f"{where}: batch([{index}]) should be task({index}) with one more leading dimension")


def _problem(task: Task) -> str | None:
    """What is wrong with a task's shapes and types, in a line."""
    for kind, x, y in (("support", task.support_x, task.support_y), ("query", task.query_x, task.query_y)):
        if x.dim() == 0 or y.dim() == 0 or len(x) != len(y) or len(x) == 0:
            return f"{kind}_x {list(x.shape)} and {kind}_y {list(y.shape)} should be equally long, at least 1"
        if y.is_floating_point() and y.dim() < 2:
            return f"{kind}_y is {list(y.shape)}; expected values [N, D], or labels as int64 [N]"
        if not y.is_floating_point() and (y.dtype != torch.int64 or bool(((y < 0) & (y != IGNORED)).any())):
            return f"{kind}_y is {y.dtype} {list(y.shape)}; expected labels from 0 on as int64 [N], or values [N, D]"
    if task.support_y.dtype != task.query_y.dtype:
        return f"support_y is {task.support_y.dtype}, query_y {task.query_y.dtype}"
    return None


def call(name: str, key: str, args: dict[str, Any], *first: Any, optional: dict[str, Any] | None = None) -> Any:
    """Calls the user's MODULE:ATTRIBUTE as (*first, **args), with those of ``optional`` that it takes."""
    function = find(name, key)
    kwargs = dict(args)
    try:
        taken = inspect.signature(function).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        kwargs = {**{k: v for k, v in (optional or {}).items() if k in taken or open_ended}, **args}
        inspect.signature(function).bind(*first, **kwargs)
    except TypeError as error:
        given = ", ".join([*(type(value).__name__ for value in first), *(f"{k}=" for k in kwargs)])
        raise ConfigError(f"{key}: {name} cannot be called as {name.partition(':')[2]}({given}): {error}") from None
    except ValueError:
        pass  # No signature to check (a builtin): the call itself will tell.
    try:
        return function(*first, **kwargs)
    except MetaHPOError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{key}: {name} failed: {brief(error)}") from error


def find(name: str, key: str) -> Callable[..., Any]:
    """The user's MODULE:ATTRIBUTE, a function or class; key: where the name stands, for the error."""
    module_name, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{key}: cannot import {module_name!r}: {brief(error)}") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise ConfigError(f"{key}: {module_name!r} ({module.__file__}) has no function or class {attribute!r}")
    return found


def brief(error: BaseException) -> str:
    """The error in one line, with the place in the user's file that raised it."""
    # Where torch, the import system or this package raised it says less than which of the user's lines led there.
    ours = (
        *(str(Path(file).parent) for file in (torch.__file__, importlib.__file__)),
        str(Path(__file__).parent),
        "<frozen ",
    )
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    # A syntax error names its place itself.
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames and not isinstance(error, SyntaxError) else ""
    return f"{reason(error)}{place}"


def reason(error: BaseException) -> str:
    """The error's kind and what it says, in one line."""
    return f"{type(error).__name__}: {one_line(error)}"
