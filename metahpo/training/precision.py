"""In what precision the nets of a learner run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from metahpo.errors import ConfigArgumentError
from metahpo.functional import FunctionalModule
from metahpo.learners.base import MetaLearner
from metahpo.training.settings import TrainingSettings


@contextmanager
def precision(learner: MetaLearner, settings: TrainingSettings) -> Iterator[None]:
    """Inside it ``learner`` runs in ``settings.precision``; afterwards all is as before.

    "bf16": every ``FunctionalModule`` of the learner runs its net under autocast to bfloat16; parameters, losses,
    updates, rates and running statistics stay in float32. "tf32": float32 products and convolutions may round their
    inputs to TF32 on a GPU that has it; on the CPU it is float32. "float32": they may not, nor may what autocast leaves
    in float32 (torch itself lets convolutions).

    Raises:
        ConfigArgumentError: Inside ``torch.autocast``.
    """
    refuse_autocast()
    modules = [module for module in learner.modules() if isinstance(module, FunctionalModule)]
    before = [module.autocast for module in modules]
    on_cuda = settings.torch_device().type == "cuda"
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn) if on_cuda else ()
    allowed = [backend.allow_tf32 for backend in backends]
    try:
        for module in modules:
            module.autocast = torch.bfloat16 if settings.precision == "bf16" else None
        for backend in backends:
            backend.allow_tf32 = settings.precision == "tf32"
        yield
    finally:
        for module, dtype in zip(modules, before):
            module.autocast = dtype
        for backend, allow in zip(backends, allowed):
            backend.allow_tf32 = allow


def refuse_autocast() -> None:
    """Refuses to run inside ``torch.autocast``, which keeps rounded copies of weights that are updated meanwhile.

    Raises:
        ConfigArgumentError: Where autocast is on in this thread.
    """
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise ConfigArgumentError(
                f"torch.autocast: found it on for {device} around a training or evaluation, expected it off; "
                "precision='bf16' of TrainingSettings runs a learner's nets in bfloat16"
            )
