"""A training, the strategies for its hypergradient, and the measurement of one in a process of its own."""

from __future__ import annotations

import multiprocessing
import queue
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from metahpo.errors import one_line
from metahpo.functional.trees import Params
from metahpo.hypergrad import CG, PES, FiniteDifference, Forward, Hypergradient, Implicit, Neumann, Strategy, Unroll
from metahpo.hypergrad.measure import measured
from metahpo.inner import SGD, InnerProblem, Mixed, Reverse, Sqrt, rule_hparams


@dataclass(frozen=True)
class Case:
    """A strategy; exact: its error is rounding alone; note: else what the error holds; compared: its error is taken,
    over the loss's hyperparameters alone where ``own`` is False."""

    strategy: Strategy
    exact: bool = False
    note: str = ""
    compared: bool = True
    own: bool = True


ONE_STEP = "biased: sees what pays off in one step"
AT_MINIMUM = "biased: takes the end for a minimum; error without the rate"
CASES: dict[str, Case] = {
    "Unroll(Reverse())": Case(Unroll(), exact=True),
    "Unroll(Reverse(), Sqrt())": Case(Unroll(Reverse(), Sqrt()), exact=True),
    "Unroll(Mixed())": Case(Unroll(Mixed()), exact=True),
    "Unroll(Mixed(), Sqrt())": Case(Unroll(Mixed(), Sqrt()), exact=True),
    "Unroll(Mixed('func'), Sqrt())": Case(Unroll(Mixed("func"), Sqrt()), exact=True),
    "Unroll(truncate=10)": Case(Unroll(truncate=10), note="biased: sees what pays off in 10 steps"),
    "Forward()": Case(Forward(), exact=True),
    "Implicit(CG)": Case(Implicit(CG(20, damping=0.01)), note=AT_MINIMUM, own=False),
    "Implicit(Neumann)": Case(Implicit(Neumann(20, 0.1)), note=AT_MINIMUM, own=False),
    "FiniteDifference()": Case(FiniteDifference(), note=ONE_STEP),
    "PES(8)": Case(PES(8, 0.01), note="a random estimate of the smoothed loss's gradient", compared=False),
}
# Equal to Unroll(Reverse()) to 1e-10 in float64, which the tests show, in a fraction of its memory.
REFERENCE = "Unroll(Reverse(), Sqrt())"
# Widths of the layers and the batch: one whose steps are over before Python has asked for the next, for long trainings,
# and one whose steps are arithmetic.
NETS = {"small": ((64, 32, 10), 64), "large": ((64, 512, 512, 10), 512)}


def problem(net_name: str, steps: int, dtype: torch.dtype) -> tuple:
    """The arguments of a strategy: a tanh MLP on batches of the digits' training half, with one log decay for each
    weight matrix and the rate; the outer loss is the other half's."""
    images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = (images / 16).to(dtype)[order], labels[order]
    half = len(x) // 2
    sizes, size = NETS[net_name]
    generator = torch.Generator().manual_seed(1)
    params: Params = {}
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        params[f"{i}.weight"] = (torch.randn(fan_out, fan_in, generator=generator) / fan_in**0.5).to(dtype)
        params[f"{i}.bias"] = torch.zeros(fan_out, dtype=dtype)
    layers = range(len(sizes) - 1)

    def net(params: Params, x: Tensor) -> Tensor:
        for i in layers:
            x = F.linear(x if i == 0 else torch.tanh(x), params[f"{i}.weight"], params[f"{i}.bias"])
        return x

    def loss(params: Params, hparams: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        squares = torch.stack([params[f"{i}.weight"].square().sum() for i in layers])
        return F.cross_entropy(net(params, batch[0]), batch[1]) + hparams["log_decay"].exp() @ squares

    def outer_loss(params: Params, hparams: Params) -> Tensor:
        return F.cross_entropy(net(params, x[half:]), y[half:])

    rule = SGD(0.1).to(dtype)
    hparams = {"log_decay": torch.full((len(layers),), -6.0, dtype=dtype), **rule_hparams(rule, "lr")}
    draws = torch.Generator().manual_seed(2)
    # A few batches in turn, so that the data take the same memory at any number of steps.
    parts = [torch.randperm(half, generator=draws)[:size] for _ in range(8)]
    data = [(x[part], y[part]) for part in parts]
    return InnerProblem(loss), rule, outer_loss, params, hparams, [data[step % 8] for step in range(steps)]


def in_a_process(net: str, name: str, steps: int, double: bool, limit: float) -> dict[str, Any]:
    """{seconds, cpu_seconds, peak_bytes, grads} of a strategy, or {left_out: why}; ``limit`` in seconds."""
    context = multiprocessing.get_context("forkserver")
    # The server computes nothing, so its copies start without threads and with all modules loaded.
    context.set_forkserver_preload(["hypergradients.cases"])
    answers = context.Queue()
    child = context.Process(target=_answer, args=(answers, net, name, steps, double), daemon=True)
    child.start()
    deadline = time.monotonic() + limit
    try:
        while True:
            try:
                return answers.get(timeout=0.1)
            except queue.Empty:
                if not child.is_alive() and answers.empty():
                    return {"left_out": f"its process ended with exit code {child.exitcode}"}
                if time.monotonic() > deadline:
                    return {"left_out": f"takes more than {limit:.0f} s"}
    finally:
        child.kill()
        child.join()


def measure(net: str, name: str, steps: int, double: bool) -> dict[str, Any]:
    """The same in this process, without a limit."""
    given = problem(net, steps, torch.float64 if double else torch.float32)
    strategy = CASES[name].strategy

    def work() -> tuple[Hypergradient, float]:
        started = time.process_time()
        found = strategy(*given)
        return found, time.process_time() - started

    try:
        strategy(*given[:-1], given[-1][:3])
        (found, cpu), seconds, peak = measured(work, torch.device("cpu"))
    except Exception as error:
        return {"left_out": f"{type(error).__name__}: {one_line(error)}"}
    grads = {name: g.double().tolist() for name, g in found.grads.items()}
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak, "grads": grads}


def _answer(answers: Any, net: str, name: str, steps: int, double: bool) -> None:
    answers.put(measure(net, name, steps, double))
