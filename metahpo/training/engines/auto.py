"""The fastest engine for a run, by a short timing."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from metahpo import torchrun
from metahpo.errors import out_of_memory
from metahpo.functional import Params
from metahpo.functional.buffers import copied_buffers
from metahpo.inner.randomness import python_draws_kept
from metahpo.learners.base import MetaLearner, Metrics
from metahpo.learners.phase import Phase
from metahpo.tasks.task import Task
from metahpo.training.engines.base import Engine, MetaGradient
from metahpo.training.engines.graph import Trace
from metahpo.training.engines.loop import Loop
from metahpo.training.engines.threads import Threads
from metahpo.training.engines.trial import GivenUp, seconds_of
from metahpo.training.engines.vmap import VMap

# Recording takes some hundred times as long as a step, and gains where steps are short because tensors are small.
_RECORD_BELOW = {"cpu": 0.25, "cuda": 1.0}


class Auto:
    """Times the engines that can run the learner on the run's own first batch, keeps the fastest, and says which.

    An engine is given up when it has lasted as long as the best so far, or takes half of the memory there is.

    On the CPU ``threads``, ``vmap`` and, for small nets, ``trace``; on CUDA ``vmap`` and ``trace``; ``loop`` where none
    of them can. (``graph`` takes minutes to compile, so it is not tried; it pays for long runs.) Engines agree to
    rounding only: ``chosen``, by kind of work, goes into checkpoints so that a resumed run goes on with the same ones.
    """

    name = "auto"

    def __init__(self) -> None:
        self.chosen: dict[str, str] = {}
        self._engines: dict[str, Engine] = {}

    def meta_gradient(self, learner: MetaLearner, tasks: Task, phase: Phase) -> MetaGradient:
        return self.settle("training", learner, tasks, phase).meta_gradient(learner, tasks, phase)

    def evaluate(self, learner: MetaLearner, tasks: Task, phase: Phase) -> tuple[Metrics, Params]:
        return self.settle("evaluation", learner, tasks, phase).evaluate(learner, tasks, phase)

    def settle(self, work: str, learner: MetaLearner, tasks: Task, phase: Phase) -> Engine:
        """The engine for "training" or "evaluation" on the tasks' device, chosen at the first call."""
        kind = f"{work} on {tasks.query_x.device.type}"
        if kind not in self._engines:
            kinds: dict[str, Callable[[], Engine]] = {k.name: k for k in (Loop, Threads, VMap, Trace)}
            if kind not in self.chosen:
                # Trials draw random numbers (dropout) that the run itself is still to draw.
                devices = [tasks.query_x.device] if tasks.query_x.is_cuda else []
                # They may write into buffers, too.
                with torch.random.fork_rng(devices=devices), python_draws_kept(), copied_buffers(learner):
                    self._engines[kind] = self._fastest(work, learner, tasks, phase)
                self.chosen[kind] = self._engines[kind].name
            else:
                self._engines[kind] = kinds[self.chosen[kind]]()
        return self._engines[kind]

    def _fastest(self, work: str, learner: MetaLearner, tasks: Task, phase: Phase) -> Engine:
        device = tasks.query_x.device.type
        seconds: dict[str, float] = {}
        engines: dict[str, Engine] = {}
        notes: list[str] = []

        def attempt(engine: Engine, part: Task, share: float) -> None:
            call: Callable[[MetaLearner, Task, Phase], Any] = (
                engine.meta_gradient if work == "training" else engine.evaluate
            )
            most = min(seconds.values(), default=math.inf)
            # Any error: one that is the learner's own comes again from the engine that is left, loop.
            try:
                taken = _time(lambda: call(learner, part, phase), device, most) / share
            except GivenUp as reason:
                notes.append(f"{engine.name}: {reason}")
            except Exception as error:
                notes.append(f"{engine.name}: no memory" if out_of_memory(error) else f"{engine.name} cannot")
            else:
                if isinstance(engine, Trace) and not engine.records:
                    notes.append("trace cannot")
                    return
                seconds[engine.name], engines[engine.name] = taken, engine

        if device == "cpu":
            threads, count = Threads(), tasks.query_x.shape[0]
            # Rounds of one task a thread last alike.
            attempt(threads, Task(*(t[: threads.workers] for t in tasks)), 1 / math.ceil(count / threads.workers))
        attempt(VMap(), tasks, 1.0)
        if work == "training" and seconds.get("vmap", 60.0) < _RECORD_BELOW[device]:
            attempt(Trace(), tasks, 1.0)
        return self._best(work, engines, seconds, notes)

    def _best(self, work: str, engines: dict[str, Engine], seconds: dict[str, float], notes: list[str]) -> Engine:
        gc.collect()
        if not engines:
            self._say(f"engine auto: loop for {work} ({', '.join(notes)})")
            return Loop()
        best = min(seconds, key=lambda name: seconds[name])
        others = [f"{name} {seconds[name]:.3g} s" for name in seconds if name != best]
        self._say(f"engine auto: {best} for {work}, {seconds[best]:.3g} s a batch ({', '.join([*others, *notes])})")
        return engines[best]

    def _say(self, line: str) -> None:
        if torchrun.rank() == 0:
            tqdm.write(line, file=sys.stderr)


def _time(call: Callable[[], Any], device: str, most: float) -> float:
    """The seconds of a call; on CUDA, where the first compiles and running out of memory ends nothing, none is cut."""
    return seconds_of(call, math.inf, torch.cuda.synchronize) if device == "cuda" else seconds_of(call, most)
