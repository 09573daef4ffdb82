"""Reptile."""

from __future__ import annotations

from itertools import cycle, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metahpo.checks import check_whole
from metahpo.errors import NetArgumentError, NetError
from metahpo.functional import Params
from metahpo.inner import FirstOrder, UpdateRule, unroll
from metahpo.learners.base import Adapted, Loss, Metrics
from metahpo.learners.maml import INNER_LR, MAML
from metahpo.learners.phase import Phase
from metahpo.tasks.minibatches import minibatches
from metahpo.tasks.task import Task


class Reptile(MAML):
    """Moves the initial weights towards those that training on a task leads to: the outer gradient is theta - w_K
    (Nichol et al. 2018, algorithm 2 and section 3), with no derivative through the training.

    net, inner_lr, loss, rule: as in ``MAML``. steps: of the training in the outer loop, on the support and the query
    set together. minibatches: into how many parts those are divided, one a step in turn, each with its share of every
    class: Reptile learns from the difference between one step's data and the next one's, and with one part it is joint
    training. eval_steps: of adapting to the support set in evaluation. All parameters are adapted, batch-norm scales
    too.

    Of the improvements of MAML++ none but the outer rate's annealing makes sense here: they weight, anneal or learn by
    derivatives through the steps. The loss that is reported is the query set's after the training, which has seen it.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        steps: int = 5,
        inner_lr: float = INNER_LR,
        minibatches: int = 2,
        eval_steps: int = 20,
        loss: Loss = F.cross_entropy,
        rule: UpdateRule | None = None,
    ):
        minibatches = check_whole(self, "minibatches", minibatches, at_least=1, error=NetArgumentError)
        eval_steps = check_whole(self, "eval_steps", eval_steps, at_least=1, error=NetArgumentError)
        super().__init__(net, steps=steps, inner_lr=inner_lr, loss=loss, rule=rule, first_order=True, adapt_norms=True)
        self.minibatches, self.eval_steps = minibatches, eval_steps

    def adapt(self, support_x: Tensor, support_y: Tensor, phase: Phase) -> Adapted:
        parts = self.minibatches if phase.training else 1
        if len(support_y) < parts:
            raise NetError(f"Reptile: {parts} minibatches of {len(support_y)} examples; take fewer, or more shots")
        start = self.initial(phase)
        batches = minibatches(support_x, support_y, parts)

        def inner_loss(params: Params, buffers: Params, batch: tuple[Tensor, Tensor], step: int):
            outputs, buffers = self.module.apply_with(params, buffers, batch[0], training=phase.training)
            return self.loss(outputs, batch[1]), buffers

        steps = self.steps if phase.training else self.eval_steps
        end = unroll(
            inner_loss,
            self.rule,
            start.params,
            islice(cycle(batches), steps),
            carry=start.buffers,
            gradient=FirstOrder(),
            keep_steps=False,
        )
        return Adapted(end.params, phase, end.carry, (end.params,))

    def meta_loss(self, task: Task, phase: Phase) -> tuple[Tensor, Metrics]:
        x, y = torch.cat([task.support_x, task.query_x]), torch.cat([task.support_y, task.query_y])
        adapted = self.adapt(x, y, phase)
        outputs, buffers = self._predict(adapted, adapted.params, adapted.buffers, task.query_x, 0)
        start = self.module.params()
        # Zero, with the gradient theta - w_K.
        pull = [((start[n] - start[n].detach()) * (start[n] - p).detach()).sum() for n, p in adapted.params.items()]
        loss = self.loss(outputs, task.query_y).detach() + torch.stack(pull).sum()
        return loss, {**self.measure(outputs, task.query_y), "buffers": self.changed(buffers)}
