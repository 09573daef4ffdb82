"""The tasks of a batch on several threads, each with one intra-op thread, on the C kernels."""

from __future__ import annotations

import contextlib
import gc
import os
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metahpo.errors import NetError
from metahpo.functional import FunctionalModule, Params
from metahpo.functional.buffers import copied_buffers
from metahpo.functional.copies import copied
from metahpo.functional.second_order import check_graph, second_derivatives
from metahpo.functional.trees import stack_trees
from metahpo.functional.turns import TURN
from metahpo.inner.randomness import draws
from metahpo.learners.base import MetaLearner, Metrics
from metahpo.learners.phase import Phase
from metahpo.native import conv_taps
from metahpo.tasks.task import Task
from metahpo.training.engines.base import MetaGradient, gradients, mean_metrics, prepare, stack_metrics
from metahpo.training.engines.python_state import Watch, shown
from metahpo.training.engines.refusal import refusal

T = TypeVar("T")


class Threads:
    """Runs as many tasks at once as torch has intra-op threads (``torch.get_num_threads()``), each on one of them.

    Small tensors leave intra-op threads little to share, whole tasks much. Each thread has a copy of the learner (its
    parameters laid out for the kernels), in which the layers of convolutional nets run on ``metahpo.native``. Results
    do not depend on which thread ran which task. For the CPU.
    """

    name = "threads"

    def __init__(self) -> None:
        self.workers = torch.get_num_threads()
        self._watched: Callable[[], MetaLearner | None] = lambda: None
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(self.workers, "metahpo", initializer=_begin)

    @TURN
    def meta_gradient(self, learner: MetaLearner, tasks: Task, phase: Phase) -> MetaGradient:
        prepare(learner, tasks, phase)
        count = tasks.query_x.shape[0]
        first = self._watched() is not learner

        def again() -> Tensor:
            return learner.meta_loss(tasks.select(0), phase)[0]

        def one(twin: MetaLearner, index: int) -> tuple[Tensor, list[Tensor], set[str], Metrics]:
            loss, metrics = twin.meta_loss(tasks.select(index), phase)
            if first and index == 0:
                check_graph(loss, again)
            return loss.detach(), *gradients(loss, twin.outer_params()), metrics

        with second_derivatives(again):
            losses, grads, used, rows = zip(*self._each(learner, one, count))
        total = grads[0]
        for more in grads[1:]:
            total = torch._foreach_add(total, more)
        means = [(t / count).contiguous() for t in total]
        stacked = torch.stack(losses)
        found = dict(zip(learner.outer_params(), means))
        unused = tuple(name for name in found if not any(name in names for names in used))
        return MetaGradient(stacked.mean(), found, mean_metrics(rows), stacked, unused)

    @TURN
    def evaluate(self, learner: MetaLearner, tasks: Task, phase: Phase) -> tuple[Metrics, Params]:
        def one(learner: MetaLearner, index: int) -> tuple[Metrics, Params]:
            with torch.no_grad(), copied_buffers(learner):
                return learner.evaluate(tasks.select(index), phase)

        prepare(learner, tasks, phase)
        results = self._each(learner, one, tasks.query_x.shape[0])
        return stack_metrics([metrics for metrics, _ in results]), stack_trees([outputs for _, outputs in results])

    def _each(self, learner: MetaLearner, one: Callable[[MetaLearner, int], T], count: int) -> list[T]:
        if any(param.is_cuda for param in learner.parameters()):
            raise NetError("engine threads runs on the CPU only; choose vmap, trace or graph for CUDA")
        if self._process != os.getpid():  # Threads do not come along in a fork.
            self._start()
        drawn = torch.get_rng_state()
        twins = [fused_copy(learner) for _ in range(min(self.workers, count))]
        watches = [Watch(twin) for twin in twins] if self._watched() is not learner else []
        copies: SimpleQueue[MetaLearner] = SimpleQueue()
        for twin in twins:
            copies.put(twin)

        def run(index: int) -> T:
            mine = copies.get()
            try:
                return one(mine, index)
            finally:
                copies.put(mine)

        with _no_collection():
            results = self._all(run, count)
        # A thread of the user's may have drawn meanwhile, so it is looked who did.
        moved = not torch.equal(drawn, torch.get_rng_state())
        if moved and any(self._all(lambda index: draws(lambda: run(index)), count)):
            raise NetError(
                f"engine threads cannot run {_drawing(learner)}: it draws random numbers, and which task got which "
                "would differ from run to run; choose vmap or loop"
            )
        if watches:
            self._refuse_python(watches)
            self._watched = weakref.ref(learner)
        return results

    def _all(self, function: Callable[[int], T], count: int) -> list[T]:
        """What ``function`` gives for 0 to ``count`` - 1, by the threads; none of them is at work any more after it,
        nor where one raised."""
        futures = [self._pool.submit(function, index) for index in range(count)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            for future in futures:
                future.cancel()
            wait(futures)
        for future in futures:
            if not future.cancelled() and (error := future.exception()):
                raise error
        return [future.result() for future in futures]

    def _refuse_python(self, watches: list[Watch]) -> None:
        """Raises NetError where the first batch showed that Python's state decides what a task computes."""
        drew = watches[0].drew()
        # Some attributes are set at a first call and stay so: then all that ran agree.
        changed = next((found for watch in watches if (found := watch.counted())), None)
        if drew or changed:
            what = "the learner draws from random or numpy.random" if drew else f"{changed} changes from call to call"
            raise NetError(f"engine threads cannot keep in order what Python keeps: {what}; choose vmap or loop")


def _begin() -> None:
    """Begins a thread of an engine."""
    torch.set_num_threads(1)
    TURN.help()


def _drawing(learner: MetaLearner) -> str:
    """The module that probably draws random numbers."""
    for name, module in learner.named_modules():
        rates = [getattr(module, key, None) for key in ("p", "dropout", "drop_prob")]
        if any(isinstance(rate, float) and 0 < rate < 1 for rate in rates):
            return f"{shown(name)} ({type(module).__name__})"
    return f"this {type(learner).__name__}"


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Puts off Python's garbage collection, which would stop all threads again and again: a step makes no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def fused_copy(learner: MetaLearner) -> MetaLearner:
    """A copy whose nets run on the C kernels; it holds the learner's own values, not copies of them.

    A thread needs its own, because to run a module with other parameters is to change it for a moment.
    """
    shared: dict[int, Any] = {id(t): _shared(t) for t in [*learner.parameters(), *learner.buffers()]}
    # What the first calls showed holds for every copy after them.
    shared |= {id(m.seen): m.seen for m in learner.modules() if isinstance(m, FunctionalModule)}
    try:
        twin = copied(learner, shared)
    except (NetError, RuntimeError) as error:  # A lock, an open file.
        raise refusal("threads", learner, error.__cause__ or error, "vmap or loop") from error
    for module in twin.modules():
        if isinstance(module, FunctionalModule):
            module.fuse()
    return twin


def _shared(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, nn.Parameter):
        return tensor
    # Updates of a weight keep its layout in memory: with the kernels' own, none has to be rearranged step by step.
    value = conv_taps(tensor.detach()) if tensor.dim() == 4 else tensor.detach()
    return nn.Parameter(value, tensor.requires_grad)
