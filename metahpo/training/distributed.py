"""Training by several processes (ranks), each on its share of every batch of tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from metahpo import torchrun
from metahpo.errors import MetaHPOError, NetError, RankError, one_line, out_of_memory
from metahpo.functional.buffers import is_running_average, load_whole_state, whole_state
from metahpo.functional.trees import Params, join
from metahpo.training.engines import MetaGradient
from metahpo.training.metrics import filled, is_loss

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run: this one's number and how many there are. With one of them everything here is free.

    Every method that talks to the others must be called by all ranks, in the same order; RankError if one has gone.
    """

    rank: int = 0
    size: int = 1
    # The names of the metrics that any rank has had, in an order that all agree on.
    _metrics: list[str] = field(default_factory=list, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    @property
    def seed(self) -> tuple[int, ...]:
        """What this rank's randomness depends on beside what one process's does: ranks must not draw the same."""
        return (self.rank,) if self.size > 1 else ()

    # Sharing the tasks of a batch.

    def share(self, numbers: range) -> range:
        """The tasks of a batch that this rank runs, never none: a rank that is left without repeats the first."""
        return self._own(numbers) or numbers[:1]

    def _own(self, numbers: range) -> range:
        """A block of the batch; the blocks of all ranks, in order, are the batch."""
        return numbers[len(numbers) * self.rank // self.size : len(numbers) * (self.rank + 1) // self.size]

    def mean(self, result: MetaGradient, numbers: range, signum: int | None) -> tuple[MetaGradient, Tensor | None]:
        """The result over the batch ``numbers`` from each rank's over its ``share``: means weighted by tasks, and
        of buffers that are no running statistics those that the last task left. Tensors are matched by name; a metric's
        mean is over the tasks of the ranks that have it.

        One collective for each dtype among the result's tensors (as a rule one) carries everything. signum: the signal
        that this rank was asked to stop by. Returns also the signals of all ranks, [size], 0 for none, on the result's
        device; None where there is but one rank.
        """
        if self.size == 1:
            return result, None
        own, losses = self._own(numbers), result.losses.new_zeros(len(numbers))
        if own:
            start = own[0] - numbers[0]
            losses[start : start + len(own)] = result.losses
        signals = result.losses.new_zeros(self.size)
        if signum:
            signals[self.rank] = signum
        buffers = _sorted(result.metrics.get("buffers", {}))
        scalars = {name: m for name, m in result.metrics.items() if name != "buffers"}
        states_of = {name: b for name, b in buffers.items() if not is_running_average(name, b)}
        averages = {name: b for name, b in buffers.items() if name not in states_of}
        leaves, spec = tree_flatten((result.loss, _sorted(result.grads), averages))
        weight = len(own) / len(numbers)
        parts = [leaf * weight if own else torch.zeros_like(leaf) for leaf in leaves]
        # Of the other buffers those of the last task's rank, as bytes, since not every type has sums.
        last = bool(own) and own[-1] == numbers[-1]
        used = result.losses.new_tensor([bool(own) and name not in result.unused for name in sorted(result.grads)])
        states = [b.contiguous().reshape(-1).view(torch.uint8) * last for b in states_of.values()]
        table = self._table(scalars, len(own), losses)
        others = losses.new_tensor(any(name not in self._metrics for name in scalars))
        sums = self._sums([*parts, losses, signals, used, table, others, *states])
        means, states = sums[: len(parts)], sums[len(parts) + 5 :]
        losses, signals, used, table, others = sums[len(parts) : len(parts) + 5]
        loss, grads, merged = tree_unflatten(means, spec)
        # A copy of each, as its bytes may begin at a place where no number of its type can.
        held = zip(states_of.items(), states)
        merged |= {n: part.clone().view(b.dtype).view(b.shape) for (n, b), part in held}
        if bool(others):
            self._metrics[:] = sorted({*self._metrics, *(name for names in self.each(list(scalars)) for name in names)})
            [table] = self._sums([self._table(scalars, len(own), losses)])
        metrics = {**dict(zip(self._metrics, table[0] / table[1])), "buffers": merged}
        unused = () if bool(used.all()) else tuple(name for name, by in zip(grads, used.tolist()) if not by)
        return MetaGradient(loss, grads, metrics, losses, unused), signals

    def _table(self, metrics: dict[str, Tensor], weight: int, like: Tensor) -> Tensor:
        """This rank's metrics times its weight, and the weights, [2, metrics]: zeros for what it does not have."""
        none = like.new_tensor(math.nan)
        values = [metrics.get(name, none).detach().to(like) for name in self._metrics]
        row = torch.stack(values) if values else like[:0]
        absent = row.isnan() & ~torch.tensor([is_loss(name) for name in self._metrics], dtype=torch.bool).to(row.device)
        if not weight:
            absent = torch.ones_like(absent)
        return torch.stack([row * weight, torch.full_like(row, weight)]).masked_fill(absent, 0)

    @torch.no_grad()
    def _sums(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sum over ranks of each tensor."""
        sums = list(tensors)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
            flat = torch.cat([tensors[place].reshape(-1) for place in places])
            with self._others():
                dist.all_reduce(flat)
            for place, part in zip(places, flat.split([tensors[place].numel() for place in places])):
                sums[place] = part.view(tensors[place].shape)
        return sums

    def in_order(self, numbers: Sequence[int], tensors: Params) -> Params:
        """All ranks' rows in the order of the tasks' numbers, from this rank's ``tensors`` [len(numbers), ...]."""
        if self.size == 1:
            return tensors
        parts = self._gather((list(numbers), tensors))
        place = {number: row for row, number in enumerate(n for numbers, _ in parts for n in numbers)}
        rows = torch.tensor([place[number] for number in sorted(place)])
        trees = filled([tree for _, tree in parts])
        return {n: join(lambda values: torch.cat(values)[rows], [tree[n] for tree in trees]) for n in trees[0]}

    # Keeping together.

    def agreed_signal(self, signum: int | None) -> int | None:
        """The signal that any rank was asked to stop by."""
        if self.size == 1:
            return signum
        return max(self._gather(signum or 0)) or None

    def on_first(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on rank 0, which alone calls it; if it fails there, all ranks stop."""
        if self.size == 1:
            return function()
        answer: list[Any] = [None]
        with self.agreed():
            if self.first:
                answer = [function()]
        with self._others():
            dist.broadcast_object_list(answer, 0)
        return answer[0]

    def share_state(self, module: nn.Module) -> None:
        """Gives every rank rank 0's parameters and buffers, by name.

        Raises:
            NetError: If their names, types or shapes differ.
        """
        if self.size > 1:
            own = {name: _form(value) for name, value in whole_state(module).items()}
            first, *_ = self.each(own)
            with self.agreed():
                for name in {**first, **own}:
                    if own.get(name) != first.get(name):
                        raise NetError(
                            f"{type(module).__name__}: {name!r} is {own.get(name, 'missing')} on rank {self.rank}, "
                            f"expected {first.get(name, 'none')}, as on rank 0"
                        )
            load_whole_state(module, self.on_first(lambda: tree_map_only(Tensor, Tensor.cpu, whole_state(module))))

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """If the block fails on any rank, all stop after it; only the first that failed raises what there is to say."""
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        failed = self._gather(error is not None)
        if error is not None and failed.index(True) == self.rank:
            raise error
        if any(failed):
            raise MetaHPOError("")  # Said by another rank.

    def each(self, value: T) -> list[T]:
        """Every rank's value, in their order."""
        return [value] if self.size == 1 else self._gather(value)

    def wait(self) -> None:
        """Waits until all ranks are here."""
        if self.size > 1:
            self._gather(None)

    def _gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        with self._others():
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def _others(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise RankError(f"rank {self.rank} stops: it lost another one ({one_line(error, 200)})") from error


def _sorted(tensors: Params) -> Params:
    """By name: ranks may have registered the layers of a net in other orders."""
    return dict(sorted(tensors.items()))


def _form(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def current() -> Ranks:
    """The ranks of this run: those of torch's default process group, or this process alone."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Inside it the processes that torchrun started can talk: on the CPU by gloo, on CUDA by NCCL.

    Without torchrun, or inside a process group of your own, it changes nothing.
    """
    if not torchrun.launched() or not dist.is_available() or dist.is_initialized():
        yield current()
        return
    # Imported later (by any torch.optim), this would keep the group as a default argument: its threads would outlive
    # the block, and one that is busy as Python ends aborts the process.
    import_module("torch.distributed.nn")
    cuda = torch.cuda.is_available()
    if cuda and (local := torchrun.local_rank() or 0) < torch.cuda.device_count():
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda and dist.is_nccl_available() else "gloo")
    try:
        yield current()
    finally:
        dist.destroy_process_group()
