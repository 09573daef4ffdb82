"""Drawing the same random numbers again."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metahpo.errors import NetError


class Draws:
    """What a piece of code drew from torch's generators (the CPU's and those of its tensors' devices).

    Code run inside ``recording`` and later inside ``replaying`` draws the same; the generators are then as if it had
    run once.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        self.devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
        self.states: list[Tensor] | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        if self.devices and torch.cuda.is_current_stream_capturing():
            # A generator's state cannot be read here. The graph's replay draws anew in both places.
            with _NoDraws():
                yield
            return
        before = self._read()
        yield
        if all(bytes(old.numpy()) == bytes(new.numpy()) for old, new in zip(before, self._read())):
            return
        if threading.current_thread() is not threading.main_thread():
            # The generator is one for all threads: another may draw between this one's draws.
            raise NetError(
                "Mixed and remat repeat the inner loop's random numbers (dropout), which is not possible on threads; "
                "choose engine loop or vmap"
            )
        self.states = before

    @contextmanager
    def replaying(self) -> Iterator[None]:
        if self.states is None:
            yield
            return
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.states[0])
            for device, state in zip(self.devices, self.states[1:]):
                torch.cuda.set_rng_state(state, device)
            yield

    def _read(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)]


class _NoDraws(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NetError(
                f"Mixed and remat cannot repeat random numbers ({func}) in a captured CUDA graph; choose engine loop "
                "or vmap"
            )
        return func(*args, **(kwargs or {}))
