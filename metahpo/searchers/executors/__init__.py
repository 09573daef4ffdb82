"""Where trials run: in this process, in others, or on other machines."""

from metahpo.searchers.executors.base import Executor as Executor
from metahpo.searchers.executors.processes import Processes as Processes
from metahpo.searchers.executors.ray_cluster import Ray as Ray
from metahpo.searchers.executors.serial import Serial as Serial
