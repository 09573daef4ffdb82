"""Saying which module an engine cannot run."""

from __future__ import annotations

from torch import nn

from metahpo.errors import NetError, one_line
from metahpo.learners.base import MetaLearner


def refusal(engine: str, learner: MetaLearner, error: BaseException, instead: str) -> NetError:
    """The error to raise where ``engine`` cannot run ``learner``: the module, why, and the engine to choose."""
    return NetError(
        f"engine {engine} cannot run {failing_module(learner, error)} ({one_line(error)}); choose {instead}"
    )


def failing_module(learner: MetaLearner, error: BaseException) -> str:
    """The innermost of the learner's modules whose method was running when ``error`` was raised."""
    names = {id(module): name for name, module in learner.named_modules()}
    found: nn.Module = learner
    trace = error.__traceback__
    while trace is not None:
        this = trace.tb_frame.f_locals.get("self")
        if isinstance(this, nn.Module) and names.get(id(this)):
            found = this
        trace = trace.tb_next
    name = names[id(found)].removeprefix("module.net").removeprefix(".")
    return f"module {name!r} ({type(found).__name__})" if name else f"this {type(found).__name__}"
