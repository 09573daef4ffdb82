"""Model-agnostic meta-learning, and the base of every learner that adapts by gradient steps."""

from __future__ import annotations

from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metahpo.checks import check_callable, check_flag, check_number, check_type, check_whole, refuse
from metahpo.errors import NetArgumentError, NetError
from metahpo.functional import FunctionalModule, Params, PerStepBatchNorm
from metahpo.functional.copies import copied, take_over
from metahpo.inner import (
    SGD,
    FirstOrder,
    InnerGradient,
    LayerStepRates,
    NoRemat,
    Remat,
    Reverse,
    UpdateRule,
    unroll,
)
from metahpo.learners.base import Adapted, Loss, MetaLearner, Metrics
from metahpo.learners.phase import Improvements, Phase
from metahpo.tasks.task import Task

# The default, known from a rate of the same value that was given by being this very object.
INNER_LR = float("0.1")


class MAML(MetaLearner):
    """Learns initial weights from which a few gradient steps fit a new task (Finn et al. 2017, algorithm 2).

    net: any module, [N, ...] in, [N, outputs] out; it is copied. steps: inner updates, in training and evaluation.
    inner_lr: their (initial) rate, 0.1 by default. learn_lr: whether the outer loop learns that one rate. loss: inner
    and outer loss. first_order: FOMAML, inner gradients are constants. improvements: those of MAML++, all off by
    default. adapt_norms: whether batch-norm scales and shifts are adapted with the rest; by default the outer loop
    alone learns them, as in MAML++. rule: an update rule of your own in place of gradient descent at inner_lr.
    gradient, remat: how the outer gradient passes through the inner loop, at what memory (``Reverse``, ``Mixed``;
    ``NoRemat``, ``Every``, ``Sqrt``): the numbers are the same; first order needs neither.

    A subclass that adapts other parameters (ANIL, BOIL) overrides ``adapted_names``, one that updates them in another
    way (Meta-SGD) ``default_rule``; every improvement still applies.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        steps: int = 5,
        inner_lr: float = INNER_LR,
        loss: Loss = F.cross_entropy,
        learn_lr: bool = False,
        first_order: bool = False,
        improvements: Improvements = Improvements(),
        adapt_norms: bool = False,
        rule: UpdateRule | None = None,
        gradient: InnerGradient = Reverse(),
        remat: Remat = NoRemat(),
    ):
        super().__init__(loss)
        check_type(self, "net", net, nn.Module, "a module", error=NetArgumentError)
        steps = check_whole(self, "steps", steps, at_least=1, error=NetArgumentError)
        rate_given = inner_lr is not INNER_LR
        inner_lr = check_number(self, "inner_lr", inner_lr, at_least=0, error=NetArgumentError)
        learn_lr = check_flag(self, "learn_lr", learn_lr, error=NetArgumentError)
        first_order = check_flag(self, "first_order", first_order, error=NetArgumentError)
        adapt_norms = check_flag(self, "adapt_norms", adapt_norms, error=NetArgumentError)
        check_type(self, "improvements", improvements, Improvements, error=NetArgumentError)
        check_type(self, "rule", rule, (UpdateRule, type(None)), "an UpdateRule or None", error=NetArgumentError)
        check_callable(self, "gradient", gradient, "an inner gradient such as Reverse()", error=NetArgumentError)
        if isinstance(remat, type) or not callable(getattr(remat, "segments", None)):
            refuse(self, "remat", remat, "NoRemat(), Every(steps) or Sqrt()", NetArgumentError)
        self._refuse_idle(rule, improvements, inner_lr=rate_given, learn_lr=learn_lr, first_order=first_order)
        self.steps, self.first_order, self.gradient, self.remat = steps, first_order, gradient, remat
        self.improvements, self.adapt_norms = improvements, adapt_norms
        self.module = FunctionalModule(
            net,
            statistics_rows=steps if improvements.per_step_statistics else 1,
            affine_rows=steps if improvements.per_step_affine else 1,
        )
        names = self.adapted_names()
        if not names:
            raise NetError(
                f"{type(net).__name__} has no parameter to adapt by {type(self).__name__}: all are frozen, batch-norm "
                "scales and shifts, or of layers that it leaves alone"
            )
        if rule is None:
            rule = self.default_rule(inner_lr, learn_lr)
            if any(p.dtype == torch.float64 for p in self.module.params().values()):
                # Never below torch's default type: a rate is to learn in small steps.
                rounded, rule = torch.tensor(inner_lr).double(), rule.double()
                with torch.no_grad():  # The rate given, and not what it became in the default type.
                    for p in rule.parameters():
                        p.copy_(torch.where(p == rounded, inner_lr, p))
        self.rule = rule

    def _refuse_idle(self, rule: UpdateRule | None, improvements: Improvements, **given: bool) -> None:
        """Raises NetArgumentError for an argument that would have no effect beside another one."""
        own = type(self).default_rule is not MAML.default_rule
        idle = {
            "rule: the learner has a rule of its own; leave it out, or take MAML": rule is not None and own,
            "inner_lr: rule has rates of its own; leave it out": rule is not None and given["inner_lr"],
            "learn_lr: rule has rates of its own; leave it out": rule is not None and given["learn_lr"],
            "rule: layer_step_rates is itself an update rule; give either": (
                rule is not None and improvements.layer_step_rates
            ),
            "learn_lr: layer_step_rates learns a rate for each step; give either": (
                improvements.layer_step_rates and given["learn_lr"] and not own
            ),
            "first_order: it holds for all epochs, first_order_epochs for some; give either": (
                given["first_order"] and improvements.first_order_epochs
            ),
        }
        for line, found in idle.items():
            if found:
                raise NetArgumentError(f"{type(self).__name__}: {line}")

    def adapted_names(self) -> list[str]:
        """The parameters of the net that the inner loop adapts."""
        skipped = set() if self.adapt_norms else self.module.norm_names()
        return [name for name in self.module.params() if name not in skipped]

    def default_rule(self, lr: float, learnable: bool) -> UpdateRule:
        """The update rule where none is given: at rate ``lr``, which the outer loop learns if ``learnable``."""
        if self.improvements.layer_step_rates:
            return LayerStepRates(self.adapted_names(), self.steps, lr)
        return SGD(lr, learnable=learnable)

    def training_phase(self, epoch: int) -> Phase:
        return self.improvements.training_phase(epoch, self.steps)

    def initial(self, phase: Phase) -> Adapted:
        """The learner before any inner step."""
        params = self.module.params()
        return Adapted({name: params[name] for name in self.adapted_names()}, phase, self.module.buffers_by_name())

    def adapt(self, support_x: Tensor, support_y: Tensor, phase: Phase) -> Adapted:
        def inner_loss(params: Params, buffers: Params, batch: tuple[Tensor, Tensor, Params], step: int):
            x, y, others = batch
            outputs, buffers = self.module.apply_with(
                {**params, **others}, buffers, x, step=step, training=phase.training
            )
            return self.loss(outputs, y), buffers

        start = self.initial(phase)
        # Those that the outer loop alone learns go in by the batch, where Mixed and remat see them.
        others = {name: p for name, p in self.module.params().items() if name not in start.params}
        first_order = self.first_order or phase.first_order
        trajectory = unroll(
            inner_loss,
            self.rule,
            start.params,
            repeat((support_x, support_y, others), self.steps),
            carry=start.buffers,
            gradient=FirstOrder() if first_order else self.gradient,
            remat=NoRemat() if first_order else self.remat,
            keep_steps=phase.step_weights is not None,
        )
        return Adapted(trajectory.params, phase, trajectory.carry, tuple(trajectory.steps))

    def predict(self, adapted: Adapted, x: Tensor) -> Tensor:
        return self._predict(adapted, adapted.params, adapted.buffers, x, self.steps - 1 if adapted.steps else 0)[0]

    def meta_loss(self, task: Task, phase: Phase) -> tuple[Tensor, Metrics]:
        adapted = self.adapt(task.support_x, task.support_y, phase)
        buffers, outputs, losses = adapted.buffers, [], []
        # Without weights the last step alone was kept.
        for step, params in enumerate(adapted.steps, start=self.steps - len(adapted.steps)):
            output, buffers = self._predict(adapted, params, buffers, task.query_x, step)
            outputs.append(output)
            losses.append(self.loss(output, task.query_y))
        loss = losses[0]
        if phase.step_weights is not None:
            loss = (torch.stack(losses) * phase.step_weights.to(loss)).sum()
        return loss, {**self.measure(outputs[-1], task.query_y), "buffers": self.changed(buffers)}

    def outputs(self, task: Task, phase: Phase) -> dict[str, Tensor]:
        """As the base class, with "before": the query set under the initial weights."""
        return {**super().outputs(task, phase), "before": self.predict(self.initial(phase), task.query_x)}

    @torch.no_grad()
    def fitted(self, support_x: Tensor, support_y: Tensor, *, inductive: bool = True) -> nn.Module:
        """A copy of the net fitted to one support set: a plain module in evaluation mode, to keep and use by itself.

        inductive: whether its batch norms, if any, use running statistics, so that one input's output is independent of
        the others; else they use each batch's own, which gives the transductive accuracy.
        """
        adapted = self.adapt(support_x, support_y, Phase())
        net = copied(self.module.net)
        take_over(net, {**adapted.params, **adapted.buffers})
        for norm in net.modules():
            if isinstance(norm, PerStepBatchNorm):
                norm.step, norm.inductive = self.steps - 1, inductive
        return net.eval()

    def _predict(
        self, adapted: Adapted, params: Params, buffers: Params, x: Tensor, step: int
    ) -> tuple[Tensor, Params]:
        phase = adapted.phase
        return self.module.apply_with(params, buffers, x, step=step, training=phase.training, inductive=phase.inductive)
