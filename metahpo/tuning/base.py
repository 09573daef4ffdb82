"""What every tuning by gradient is: outer steps, a state to go on from, a result to take away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from metahpo.checks import check_callable
from metahpo.errors import ConfigArgumentError
from metahpo.learners.accuracy import accuracy
from metahpo.training.environment import progress
from metahpo.training.metrics import Row
from metahpo.training.precision import refuse_autocast


class Result(Protocol):
    """What a tuning found."""

    def table(self) -> str:
        """The findings as a markdown table, for the terminal and the report."""
        ...

    def pictures(self) -> dict[str, Figure]:
        """The pictures of the report by file name, without ending."""
        ...

    def tensors(self) -> dict[str, Any]:
        """The findings as tensors and plain values, as ``torch.load(file, weights_only=True)`` reads them."""
        ...


def check_on_step(function: Callable[..., Any], on_step: Any) -> None:
    """Raises ArgumentError unless it is a function or None."""
    if on_step is not None:
        check_callable(function.__name__, "on_step", on_step, "a function of each step's figures, or None")


def check_loss(tuner: Tuner, loss: Any, forward: Any) -> None:
    """Raises ConfigArgumentError unless one of them is a function and the other None."""
    if (loss is None) == (forward is None):
        both = "neither" if loss is None else "both"
        raise ConfigArgumentError(f"loss: found {both} of loss and forward, expected one of them")
    if forward is None:
        check_callable(tuner, "loss", loss, "a function of outputs and targets", error=ConfigArgumentError)
    else:
        check_callable(tuner, "forward", forward, "a function of net and batch", error=ConfigArgumentError)


class Tuner:
    """A tuning by gradient, one outer step at a time.

    A subclass writes ``step``, ``result``, ``state_dict`` and ``load_state_dict``. What step i draws at random depends
    on (seed, i) alone, so that a tuning which goes on from its state is the one that was not stopped.

    title: for the progress bar; iterations: outer steps in all; iteration: those done; history: their rows; warnings:
    what the user should know, a line each, in the order in which it came up.
    """

    title = "tuning"

    def __init__(self, iterations: int):
        self.iterations = iterations
        self.iteration = 0
        self.history: list[Row] = []
        self.warnings: dict[str, None] = {}

    def step(self) -> Row:
        """Makes outer step number ``self.iteration`` (from 0) and returns its figures, "val_loss" among them."""
        raise TypeError(f"{type(self).__name__} does not define step()")

    def result(self) -> Result:
        """What the steps so far have found."""
        raise TypeError(f"{type(self).__name__} does not define result()")

    def compare(self, x: Tensor, y: Tensor) -> dict[str, Row]:
        """What the finding is worth on test data: a row of figures ("loss", "accuracy") by the name of each training
        compared, the tuned one first and its control after it."""
        raise TypeError(f"{type(self).__name__} does not define compare(x, y)")

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, as tensors and plain values."""
        raise TypeError(f"{type(self).__name__} does not define state_dict()")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise TypeError(f"{type(self).__name__} does not define load_state_dict(state)")

    def run(self, until: int | None = None, each: Callable[[Row], None] | None = None) -> Result:
        """Makes the steps that are left (up to ``until`` in all), with a progress bar on a terminal.

        each: called after every step with its row.
        """
        refuse_autocast()
        until = self.iterations if until is None else min(until, self.iterations)
        with progress(self.title, self.iterations, self.iteration) as bar:
            while self.iteration < until:
                row = self.step()
                self.iteration += 1
                self.history.append({"iteration": self.iteration, **row})
                bar.update()
                bar.set_postfix_str(f"val loss {row['val_loss']:.4f}", refresh=False)
                if each:
                    each(self.history[-1])
        return self.result()


def by_name(optimizer: Mapping[str, Any], saved: Iterable[str], own: Iterable[str]) -> dict[str, Any]:
    """The state dict of an optimizer of tensors called ``saved``, in that order, for one of those called ``own``."""
    place = {name: index for index, name in enumerate(saved)}
    moved = {index: optimizer["state"].get(place[name]) for index, name in enumerate(own)}
    return {**optimizer, "state": {index: values for index, values in moved.items() if values is not None}}


def test(net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Row:
    """The net's loss in evaluation mode and, for labels, its accuracy; on all examples at once."""
    net.eval()
    with torch.no_grad():
        # Copies, as it is used again whatever the net or the loss writes into it.
        output = net(x.clone())
        row = {"loss": float(loss(output, y.clone()))}
        share = accuracy(output, y, loss)
        if share is not None and not share.isnan():
            row["accuracy"] = float(share.double())
    return row
