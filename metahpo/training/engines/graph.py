"""The whole meta-gradient recorded once and replayed, compiled or not; on CUDA as a CUDA graph."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from metahpo.errors import MetaHPOError, one_line, out_of_memory
from metahpo.functional import FunctionalModule, Params
from metahpo.functional.turns import TURN
from metahpo.inner.randomness import Unrepeatable
from metahpo.learners.base import MetaLearner, Metrics
from metahpo.learners.phase import Phase
from metahpo.tasks.task import Task
from metahpo.training.engines.base import MetaGradient, prepare
from metahpo.training.engines.record import Program, Record
from metahpo.training.engines.refusal import failing_module
from metahpo.training.engines.vmap import VMap, batched_gradient


class Trace:
    """Records the tensor operations of ``vmap``'s meta-gradient at the first step and replays them after that.

    What Python, autograd and torch.func do between the operations, most of the time where tensors are small, is done
    once. On CUDA the record becomes a CUDA graph, started as a whole: no step waits for the host, and the results are
    overwritten by the next step's. Recording takes seconds. A learner that cannot be recorded, because it reads values
    of tensors (data-dependent control flow) or because Python decides what it computes (random numbers of ``random`` or
    ``numpy.random``, counters, attributes that change), and a batch of other shapes than the first run as ``vmap``
    does, with one warning; so does evaluation, without one. Some steps run both ways, ever more rarely, to see that the
    record still is what a step would do.
    """

    name = "trace"
    exact = True

    def __init__(self) -> None:
        self._vmap = VMap()
        self._learner: Callable[[], MetaLearner | None] = lambda: None
        self._records: dict[Any, Record | None] = {}
        self._shapes: dict[Any, Any] = {}

    @TURN
    def meta_gradient(self, learner: MetaLearner, tasks: Task, phase: Phase) -> MetaGradient:
        prepare(learner, tasks, phase)
        if self._learner() is not learner:
            self._learner, self._records, self._shapes = weakref.ref(learner), {}, {}
        kind, record = self._record(learner, tasks, phase)
        if record is None:
            return self._vmap.meta_gradient(learner, tasks, phase)
        result, reason = record.step(
            learner,
            lambda: self._vmap.meta_gradient(learner, tasks, phase),
            lambda: self._make(learner, tasks, phase),
            (*_tensors(learner), tasks, phase.step_weights),
        )
        if reason is not None:
            self._records[kind] = None
            if reason:
                warnings.warn(f"engine {self.name}: {reason}; running as vmap", stacklevel=3)
        return self._vmap.unused.told(result, learner, tasks, phase)

    @property
    def records(self) -> bool:
        """Whether any step so far was recorded, and not run as ``vmap``."""
        return any(record is not None and record.made for record in self._records.values())

    def evaluate(self, learner: MetaLearner, tasks: Task, phase: Phase) -> tuple[Metrics, Params]:
        return self._vmap.evaluate(learner, tasks, phase)

    def _record(self, learner: MetaLearner, tasks: Task, phase: Phase) -> tuple[Any, Record | None]:
        autocast = tuple(m.autocast for m in learner.modules() if isinstance(m, FunctionalModule))
        kind = (replace(phase, step_weights=None), phase.step_weights is None, autocast)
        shapes = _signature((*_tensors(learner), tasks, phase.step_weights))
        if self._shapes.setdefault(kind, shapes) != shapes:
            # Once: a second set of shapes is usually the last, smaller batch, for which recording does not pay.
            if (kind, "other") not in self._records:
                self._records[kind, "other"] = None
                warnings.warn(f"engine {self.name}: batches of other shapes than the first run as vmap", stacklevel=4)
            return kind, None
        if kind not in self._records:
            self._records[kind] = Record(self.exact)
        return kind, self._records[kind]

    def _make(self, learner: MetaLearner, tasks: Task, phase: Phase) -> Program | None:
        try:
            return self._recorded(learner, tasks, phase)
        except Unrepeatable as error:
            warnings.warn(f"engine {self.name}: {error}, which a record cannot; running as vmap", stacklevel=5)
            return None
        except MetaHPOError:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            reason = f"{failing_module(learner, error)} ({type(error).__name__}: {one_line(error)})"
            warnings.warn(
                f"engine {self.name} cannot record {reason}; running as vmap",
                stacklevel=5,
            )
            return None

    def _recorded(self, learner: MetaLearner, tasks: Task, phase: Phase) -> Program:
        def run(outer: Params, others: Params, tasks: Task, weights: Tensor | None) -> MetaGradient:
            return batched_gradient(learner, outer, others, tasks, replace(phase, step_weights=weights))

        inputs = (*_tensors(learner), tasks, phase.step_weights)
        with torch.random.fork_rng(devices=_devices(tasks)):
            # One fake mode for the whole record, or make_fx makes one for each of its operations: half of its time.
            with tracing(TracingContext(FakeTensorMode())):
                recorded = make_fx(run)(*inputs)
            recorded.graph.eliminate_dead_code()
            recorded.recompile()
            program = self._made_fast(recorded)
            with torch.no_grad():
                return _captured(program, inputs) if tasks.query_x.is_cuda else program

    def _made_fast(self, recorded: torch.fx.GraphModule) -> Program:
        return recorded


class Graph(Trace):
    """``Trace`` with the record compiled by TorchInductor, which fuses operations and drops those that repeat.

    Compiling takes a minute or more for each kind of phase at the first time; later runs find the result in Inductor's
    cache. Dropout draws other random numbers than with the other engines. Where compiling fails, the record is used as
    it is, with one warning.
    """

    name = "graph"
    exact = False

    def _made_fast(self, recorded: torch.fx.GraphModule) -> Program:
        compiled = torch.compile(recorded, fullgraph=True, dynamic=False)
        failed = False

        def program(*inputs: Any) -> MetaGradient:
            nonlocal failed
            if failed:
                return recorded(*inputs)
            try:
                return compiled(*inputs)
            except Exception as error:
                if out_of_memory(error):
                    raise
                failed = True
                reason = f"{type(error).__name__}: {one_line(error)}"
                warnings.warn(f"engine graph cannot compile this learner ({reason}); running as trace", stacklevel=6)
                return recorded(*inputs)

        return program


def _tensors(learner: MetaLearner) -> tuple[Params, Params]:
    """The learned parameters, and the other parameters and buffers, by name."""
    outer = learner.outer_params()
    others = {n: t for n, t in [*learner.named_parameters(), *learner.named_buffers()] if n not in outer}
    return {name: p.detach() for name, p in outer.items()}, {name: t.detach() for name, t in others.items()}


def _signature(inputs: Any) -> list[Any]:
    leaves, structure = tree_flatten(inputs)  # With the names: another parameter may have been frozen.
    return [structure, *((t.shape, t.dtype, t.device) for t in leaves if isinstance(t, Tensor))]


def _devices(tasks: Task) -> list[torch.device]:
    return [tasks.query_x.device] if tasks.query_x.is_cuda else []


def _captured(program: Program, inputs: tuple[Any, ...]) -> Program:
    """``program`` as a CUDA graph over copies of its inputs, which each call fills first."""
    leaves, structure = tree_flatten(inputs)
    static = [t.clone() if isinstance(t, Tensor) else t for t in leaves]
    held = tree_unflatten(static, structure)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # Libraries choose their kernels and take their memory before, not during the capture.
            program(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads (the prefetch of tasks, NCCL's watchdog) call CUDA meanwhile, and may.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = program(*held)
    to = [t for t in static if isinstance(t, Tensor)]

    def replay(*inputs: Any) -> MetaGradient:
        torch._foreach_copy_(to, [t for t in tree_flatten(inputs)[0] if isinstance(t, Tensor)], non_blocking=True)
        graph.replay()
        return results

    return replay
