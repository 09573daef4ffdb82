"""Engines: ways to run a learner over a batch of tasks."""

from collections.abc import Callable

from metahpo.training.engines.auto import Auto as Auto
from metahpo.training.engines.base import Engine as Engine
from metahpo.training.engines.base import MetaGradient as MetaGradient
from metahpo.training.engines.check import check_engine as check_engine
from metahpo.training.engines.check import check_gradient as check_gradient
from metahpo.training.engines.graph import Graph as Graph
from metahpo.training.engines.graph import Trace as Trace
from metahpo.training.engines.loop import Loop as Loop
from metahpo.training.engines.threads import Threads as Threads
from metahpo.training.engines.vmap import VMap as VMap

ENGINES: dict[str, Callable[[], Engine]] = {
    "auto": Auto,
    "loop": Loop,
    "threads": Threads,
    "vmap": VMap,
    "trace": Trace,
    "graph": Graph,
}
