"""Everything that is timed, under one face: our engines and the peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inner_loop.peers import PEERS, LeftOut, make_peer
from inner_loop.workloads import Workload
from metahpo.errors import MetaHPOError, one_line
from metahpo.training.engines import ENGINES

# "auto" is one of the others.
KINDS = {name: "engine" for name in ENGINES if name != "auto"} | dict.fromkeys(PEERS, "peer")


@dataclass(frozen=True)
class Contender:
    """name; kind: "engine" or "peer"; step: one meta-step; grads: what a step returned, as gradients by the learner's
    names."""

    name: str
    kind: str
    step: Callable[[], Any]
    grads: Callable[[Any], dict[str, Tensor]]


def make(name: str, workload: Workload) -> Contender:
    """The contender of this name. Raises LeftOut if it cannot take part."""
    if KINDS[name] == "engine":
        engine = ENGINES[name]()

        def meta_gradient() -> Any:
            try:
                return engine.meta_gradient(workload.learner, workload.tasks, workload.phase)
            except MetaHPOError as error:
                raise LeftOut(f"refused: {one_line(error)}") from error

        return Contender(name, "engine", meta_gradient, lambda result: result.grads)
    step = make_peer(name, workload.problem, workload.tasks)
    return Contender(name, "peer", step, lambda grads: workload.canonical({k: tensor(g) for k, g in grads.items()}))


def tensor(grad: Any) -> Tensor:
    """A gradient of any library as a torch tensor."""
    return grad if isinstance(grad, Tensor) else torch.from_numpy(np.array(grad))
