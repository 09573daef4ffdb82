"""Engines: ways to run a learner over a batch of tasks."""

from metahpo.training.engines.base import Engine as Engine
from metahpo.training.engines.base import MetaGradient as MetaGradient
from metahpo.training.engines.loop import Loop as Loop
from metahpo.training.engines.threads import Threads as Threads
from metahpo.training.engines.vmap import VMap as VMap

ENGINES: dict[str, type[Engine]] = {"loop": Loop, "threads": Threads, "vmap": VMap}
