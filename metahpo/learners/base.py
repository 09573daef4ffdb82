"""The base class of meta-learners."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metahpo.checks import KnownKeywords, check_callable
from metahpo.errors import NetArgumentError, NetError
from metahpo.functional import FunctionalModule, Params
from metahpo.functional.surgery import current_names
from metahpo.functional.turns import TURN
from metahpo.learners.accuracy import accuracy
from metahpo.learners.phase import Phase
from metahpo.tasks.task import Task

Loss = Callable[[Tensor, Tensor], Tensor]
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Adapted:
    """What a learner made of one support set.

    params: the fitted tensors by name (weights, prototypes, ...); phase: how it was fitted; buffers: running statistics
    and other buffers after fitting; steps: the parameters after each inner step, or after the last alone, where there
    are steps.
    """

    params: Params
    phase: Phase
    buffers: Params = field(default_factory=dict)
    steps: tuple[Params, ...] = ()


class MetaLearner(KnownKeywords, nn.Module):
    """A learner of learners: ``parameters()`` are what the outer loop learns.

    A subclass writes ``adapt`` and ``predict``, as pure functions of the learner's parameters and their arguments:
    nothing is kept on ``self`` and nothing is written in place, so that the same code runs in a loop and under
    ``torch.func.vmap``. Threads that call the methods of learners take turns: one may be used while it is trained.

    loss: (outputs [N, ...], targets [N, ...]) -> scalar. Cross entropy is right for class labels, mean squared error
    for regression.
    """

    keyword_error = NetArgumentError

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("adapt", "predict", "meta_loss", "outputs", "evaluate", "look_at", "fitted"):
            if name in vars(cls):
                setattr(cls, name, TURN(vars(cls)[name]))

    # Whether the means of several learners' outputs are outputs too, those of an ensemble.
    averages = True

    def __init__(self, loss: Loss = F.cross_entropy):
        super().__init__()
        expected = "a function (outputs, targets) -> scalar"
        self.loss = check_callable(self, "loss", loss, expected, error=NetArgumentError)

    # What a subclass writes.

    def adapt(self, support_x: Tensor, support_y: Tensor, phase: Phase) -> Adapted:
        """Fits the learner to one support set: ``support_x`` [N, ...], ``support_y`` [N]."""
        raise TypeError(f"{type(self).__name__} does not define adapt(support_x, support_y, phase)")

    def predict(self, adapted: Adapted, x: Tensor) -> Tensor:
        """The outputs for ``x`` [N, ...]: logits [N, ways] or [N, ways, ...], values [N, D], or whatever tree of
        tensors the loss takes."""
        raise TypeError(f"{type(self).__name__} does not define predict(adapted, x)")

    # What it inherits, and may override.

    def training_phase(self, epoch: int) -> Phase:
        """How to run in training epoch ``epoch`` (from 0)."""
        return Phase(training=True)

    @TURN
    def meta_loss(self, task: Task, phase: Phase) -> tuple[Tensor, Metrics]:
        """The outer loss of one task, and metrics: scalars by name, and under "buffers" new buffers by name."""
        adapted = self.adapt(task.support_x, task.support_y, phase)
        outputs = self.predict(adapted, task.query_x)
        metrics = {**self.measure(outputs, task.query_y), "buffers": self.changed(adapted.buffers)}
        return self.loss(outputs, task.query_y), metrics

    @TURN
    def outputs(self, task: Task, phase: Phase) -> dict[str, Tensor]:
        """The outputs [N, ...] for a task's query set, by kind.

        "after": after adapting, the query set normalised by its own batch statistics where the learner has batch norm
        (transductive, as the papers report); "inductive": each query predicted alone.
        """
        adapted = self.adapt(task.support_x, task.support_y, phase)
        after = alone = self.predict(adapted, task.query_x)
        if self.batch_dependent:
            alone = self.predict(replace(adapted, phase=replace(phase, inductive=True)), task.query_x)
        return {"after": after, "inductive": alone}

    def judge(self, outputs: dict[str, Tensor], targets: Tensor) -> Metrics:
        """Scalar metrics of one task from its ``outputs``: ``loss``, ``accuracy``, ``loss_inductive`` and so on."""
        metrics = {}
        for kind, values in outputs.items():
            suffix = "" if kind == "after" else f"_{kind}"
            metrics[f"loss{suffix}"] = self.loss(values, targets)
            for name, value in self.measure(values, targets).items():
                if f"{name}{suffix}" in metrics:
                    raise NetArgumentError(
                        f"{type(self).__name__}.measure: gives {name!r}, expected another name: it is the loss's"
                    )
                metrics[f"{name}{suffix}"] = value
        return metrics

    @TURN
    def evaluate(self, task: Task, phase: Phase) -> tuple[Metrics, dict[str, Tensor]]:
        """One task's metrics and outputs."""
        outputs = self.outputs(task, phase)
        return self.judge(outputs, task.query_y), outputs

    @property
    def batch_dependent(self) -> bool:
        """Whether a prediction depends on the other inputs of its batch; by default, whether a net has batch norm."""
        return any(isinstance(m, FunctionalModule) and m.batch_dependent for m in self.modules())

    # What the trainer and the engines use.

    def look_at(self, x: Tensor) -> None:
        """Looks, at the first call, at how an example batch ``x`` [N, ...] passes through the net, if it matters."""

    def current_state(self, state: Params) -> Params:
        """A state dict of this or the version before by the names of this one."""
        return current_names(self, state)

    @TURN
    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        """As torch's."""
        return super().state_dict(*args, **options)

    @TURN
    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """As torch's; a state dict of the version before is taken too."""
        return super().load_state_dict(self.current_state(dict(state_dict)), *args, **options)

    def forward(self, task: Task, phase: Phase) -> tuple[Tensor, Metrics]:
        """``meta_loss``, so that ``torch.func.functional_call`` runs the learner with other parameters."""
        return self.meta_loss(task, phase)

    def measure(self, outputs: Tensor, targets: Tensor) -> Metrics:
        """Scalars by name: ``accuracy`` for integer targets whose shape the outputs fit; nothing for regression.

        One that a task does not have may be left out or be NaN: means are over the tasks that have it. None may be
        called ``loss``.
        """
        found = accuracy(outputs, targets, self.loss)
        return {} if found is None else {"accuracy": found}

    def outer_params(self) -> Params:
        """The parameters that the outer loop learns, by dotted name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def changed(self, buffers: Params) -> Params:
        """Those buffers of ``self.module`` (a FunctionalModule) that a call replaced, by their names in the learner."""
        own = cast(FunctionalModule, self.module).buffers_by_name() if buffers else {}
        return {f"module.net.{name}": b.detach() for name, b in buffers.items() if b is not own[name]}

    @TURN
    @torch.no_grad()
    def update_buffers(self, buffers: Params) -> None:
        """Takes over new values of buffers, by dotted name. Raises NetError for one that changed its shape."""
        own = dict(self.named_buffers())
        for name, value in buffers.items():
            if own[name].shape != value.shape:
                raise NetError(
                    f"buffer {name!r} became {list(value.shape)} in training, expected {list(own[name].shape)}; a "
                    "buffer must keep its shape"
                )
            own[name].copy_(value)
