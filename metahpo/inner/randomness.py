"""Drawing the same random numbers again."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import TorchDispatchMode

from metahpo.errors import NetError
from metahpo.functional.levels import levels
from metahpo.functional.turns import TURN


class Unrepeatable(NetError):
    """Random numbers that cannot be drawn again where the code runs now."""


class Draws:
    """What a piece of code drew from torch's generators (the CPU's and those of its tensors' devices), from ``random``
    and from ``numpy.random``.

    Code run inside ``recording`` and later inside ``replaying`` draws the same; the generators are then as if it had
    run once.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        self.devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
        self.states: list[Tensor] | None = None
        self.python: PythonDraws | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        if self.devices and torch.cuda.is_current_stream_capturing():
            # A generator's state cannot be read here. The graph's replay draws anew in both places.
            with _NoDraws():
                yield
            return
        # The generators are one for all threads: another may draw between this one's draws.
        alone = not TURN.helping
        before, python = self._read(), python_draws() if alone else None
        yield
        now = self._read()
        with temporarily_clear_interpreter_stack():
            drew = any(not torch.equal(old, new) for old, new in zip(before, now))
        if drew and not alone:
            raise NetError(
                "Mixed, remat and iMAML repeat the inner loop's random numbers (dropout), which is not possible on "
                "threads; choose engine loop or vmap"
            )
        drew_in_python = alone and python != python_draws()
        if drew and _being_recorded():
            # A record holds the draws, but not that a generator is set back.
            raise Unrepeatable("Mixed, remat and iMAML repeat the inner loop's random numbers")
        self.states = before if drew else None
        self.python = python if drew_in_python else None

    @contextmanager
    def replaying(self) -> Iterator[None]:
        if self.states is None and self.python is None:
            yield
            return
        now, python = self._read(), python_draws()
        if self.states is not None:
            self._write(self.states)
        if self.python is not None:
            set_python_draws(self.python)
        try:
            yield
        finally:
            if self.states is not None:
                self._write(now)
            if self.python is not None:
                set_python_draws(python)

    def _read(self) -> list[Tensor]:
        # torch.func wraps what is made inside it, and a generator's state has to be a plain tensor.
        with temporarily_clear_interpreter_stack():
            return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)]

    def _write(self, states: list[Tensor]) -> None:
        with temporarily_clear_interpreter_stack():
            torch.set_rng_state(states[0])
            for device, state in zip(self.devices, states[1:]):
                torch.cuda.set_rng_state(state, device)


PythonDraws = tuple[Any, Any]


def python_draws() -> PythonDraws:
    """The states of ``random`` and, where it was imported, of ``numpy.random``; equal if nothing was drawn between."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return random.getstate(), None
    kind, key, *rest = numpy.random.get_state()
    return random.getstate(), (kind, key.tobytes(), *rest)


def set_python_draws(states: PythonDraws) -> None:
    """Sets the generators of ``random`` and ``numpy.random`` to such states."""
    random.setstate(states[0])
    if states[1] is not None:
        numpy: Any = sys.modules["numpy"]
        kind, key, *rest = states[1]
        numpy.random.set_state((kind, numpy.frombuffer(key, dtype="uint32"), *rest))


@contextmanager
def python_draws_kept() -> Iterator[None]:
    """After it the generators of ``random`` and ``numpy.random`` are as before."""
    before = python_draws()
    try:
        yield
    finally:
        set_python_draws(before)


def same_draws(function: Callable[..., Any], tensors: Iterable[Tensor]) -> Callable[..., Any]:
    """The same function, in which every call draws the random numbers (dropout) that the first one drew.

    tensors: some on each device where it draws.
    """
    draws: Draws | None = None

    def call(*arguments: Any) -> Any:
        nonlocal draws
        if draws is None:
            draws = Draws(tensors)
            with draws.recording():
                return function(*arguments)
        with draws.replaying():
            return function(*arguments)

    return call


def repeatable(
    loss: Callable[..., Any], instead: str = "choose Reverse() and NoRemat(), which compute it once"
) -> Callable[..., Any]:
    """The same inner loss; raises NetError if in step 0 a second call gives another value than the first.

    instead: what to do about it. A backward pass that runs a step again at the same parameters would otherwise be that
    of another function.
    """
    first: list[Tensor] = []

    def call(*arguments: Any) -> Any:
        result = loss(*arguments)
        if arguments[3] or len(first) == 2 or not readable(result[0]):
            return result
        *_, value = levels(result[0])
        value = value.detach()
        first.append(value)
        if len(first) == 2 and first[0].shape == value.shape:
            # Rounding, of which forward mode has its own, is a thousandth of this.
            bound = 30 * torch.finfo(value.dtype).eps ** 0.5 * (1e-3 + value.abs() + first[0].abs())
            apart = (value - first[0]).abs() > bound
            if bool(apart.any()):
                raise NetError(
                    f"the inner loss of step 0 is {float(value[apart][0]):.6g} when it is computed again, and was "
                    f"{float(first[0][apart][0]):.6g}: something in it counts, or draws random numbers that are "
                    f"neither torch's, random's nor numpy.random's own; {instead}"
                )
        return result

    return call


def readable(tensor: Tensor) -> bool:
    """Whether the numbers in a tensor can be looked at now: not while a compiler, a record (``make_fx``) or a CUDA
    graph is made."""
    if torch.compiler.is_compiling() or _being_recorded():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _being_recorded() -> bool:
    """Whether the operations run now become a record (``make_fx``)."""
    modes = torch._C._TorchDispatchModeKey  # pyright: ignore[reportAttributeAccessIssue]
    return torch._C._get_dispatch_mode(modes.PROXY) is not None  # pyright: ignore[reportAttributeAccessIssue]


def draws(function: Callable[[], Any]) -> bool:
    """Whether ``function``, called once, draws from torch's generators; others do not count."""
    with _Draws() as mode:
        function()
    return mode.seen


class _Draws(TorchDispatchMode):
    seen = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class _NoDraws(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Unrepeatable(
                f"Mixed, remat and iMAML cannot repeat random numbers ({func}) in a captured CUDA graph; "
                "choose engine loop or vmap"
            )
        return func(*args, **(kwargs or {}))
