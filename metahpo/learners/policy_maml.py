"""Model-agnostic meta-learning of a policy."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from metahpo.checks import check_number, check_type, refuse
from metahpo.errors import NetArgumentError, NetError
from metahpo.functional import Params
from metahpo.inner import FirstOrder, Reverse, UpdateRule, unroll
from metahpo.learners.base import Adapted, Metrics
from metahpo.learners.maml import INNER_LR, MAML
from metahpo.learners.phase import Improvements, Phase
from metahpo.rl import Environment, GaussianPolicy, Rollout, advantages, log_prob, roll_out
from metahpo.tasks.task import Task


class PolicyMAML(MAML):
    """Learns an initial policy that a few policy gradient steps fit to a new task (Finn et al. 2017, algorithm 3).

    Its tasks are those of ``RolloutTasks``. An inner step rolls out the policy as it then is on the support noise and
    descends ``surrogate``; the outer loss is the same of the adapted policy's query episodes. As in that paper, the
    outer gradient does not credit the initial policy for the episodes that it adapts to (E-MAML and ProMP do).

    net: means of actions, observations [N, O] in, [N, A] out; it is copied, and runs in evaluation mode. The actions'
    deviations are adapted and learnt with it. steps: inner steps, each with its own share of the support episodes.
    layer_step_rates: a learnt rate for each tensor and step instead of one rate, which ``learn_lr`` has learnt.
    discount, gae: of ``advantages``. initial_std: of ``GaussianPolicy``. Others as ``MAML``.
    """

    averages = False

    def __init__(
        self,
        net: nn.Module,
        environment: Environment,
        *,
        steps: int = 1,
        inner_lr: float = INNER_LR,
        learn_lr: bool = False,
        layer_step_rates: bool = False,
        first_order: bool = False,
        rule: UpdateRule | None = None,
        discount: float = 0.99,
        gae: float = 1.0,
        initial_std: float = 1.0,
    ):
        check_type(self, "net", net, nn.Module, "a module", error=NetArgumentError)
        if not all(hasattr(environment, name) for name in ("draw", "reset", "step", "action_size")):
            refuse(self, "environment", environment, "an Environment", NetArgumentError)
        discount = check_number(self, "discount", discount, at_least=0, at_most=1, error=NetArgumentError)
        gae = check_number(self, "gae", gae, at_least=0, at_most=1, error=NetArgumentError)
        initial_std = check_number(self, "initial_std", initial_std, above=0, error=NetArgumentError)
        super().__init__(
            GaussianPolicy(net, environment.action_size, initial_std),
            steps=steps,
            inner_lr=inner_lr,
            learn_lr=learn_lr,
            first_order=first_order,
            improvements=Improvements(layer_step_rates=layer_step_rates),
            rule=rule,
        )
        if self.module.batch_dependent:
            raise NetError(f"{type(net).__name__} has batch norm: an action would depend on the other episodes")
        self.environment, self.discount, self.gae = environment, discount, gae

    def adapt(self, support_x: Tensor, support_y: Tensor, phase: Phase) -> Adapted:
        if len(support_x) % self.steps:
            raise NetError(f"{len(support_x)} support episodes cannot be shared evenly among {self.steps} inner steps")

        def inner_loss(params: Params, carry: None, batch: tuple[Tensor, Tensor], step: int) -> tuple[Tensor, None]:
            return self.surrogate(params, self.roll_out(params, *batch)), carry

        start = self.initial(phase)
        trajectory = unroll(
            inner_loss,
            self.rule,
            start.params,
            zip(support_x.chunk(self.steps), support_y.chunk(self.steps)),
            gradient=FirstOrder() if self.first_order or phase.first_order else Reverse(),
            keep_steps=False,
        )
        return Adapted(trajectory.params, phase, start.buffers)

    def roll_out(self, params: Params, noise: Tensor, parameters: Tensor) -> Rollout:
        """Episodes of the policy with ``params``: ``noise`` [E, H, A], ``parameters`` [E, P]."""
        fixed = {name: p.detach() for name, p in params.items()}
        return roll_out(self.environment, lambda seen: self._policy(fixed, seen), noise, parameters)

    def surrogate(self, params: Params, rollout: Rollout) -> Tensor:
        """Minus the mean over steps of log pi(action) * advantage: its gradient is the policy gradient's estimate where
        ``params`` are those that were rolled out."""
        mean, log_std = self._policy(params, rollout.observations.flatten(0, 1))
        found = log_prob(rollout.actions.flatten(0, 1), mean, log_std).view_as(rollout.rewards)
        weights = advantages(rollout, self.discount, self.gae) / rollout.taken.sum()
        return -(found * weights).sum()

    def predict(self, adapted: Adapted, x: Tensor) -> Tensor:
        """The means of actions [N, A] for observations [N, O]."""
        return self._policy(adapted.params, x)[0]

    def meta_loss(self, task: Task, phase: Phase) -> tuple[Tensor, Metrics]:
        adapted = self.adapt(task.support_x, task.support_y, phase)
        rollout = self.roll_out(adapted.params, task.query_x, task.query_y)
        return self.surrogate(adapted.params, rollout), {"return": rollout.returns().mean(), "buffers": {}}

    def outputs(self, task: Task, phase: Phase) -> dict[str, Tensor]:
        """The undiscounted returns [E] of the query episodes, "after" adapting and "before"."""
        adapted = self.adapt(task.support_x, task.support_y, phase)
        kinds = {"after": adapted, "before": self.initial(phase)}
        return {k: self.roll_out(a.params, task.query_x, task.query_y).returns() for k, a in kinds.items()}

    def judge(self, outputs: dict[str, Tensor], targets: Tensor) -> Metrics:
        """``return`` and ``return_before``, means over the query episodes; ``loss`` is minus the first."""
        after, before = (outputs[kind].mean() for kind in ("after", "before"))
        return {"return": after, "return_before": before, "loss": -after}

    def _policy(self, params: Params, observations: Tensor) -> tuple[Tensor, Tensor]:
        output, _ = self.module.apply_with(params, self.module.buffers_by_name(), observations, training=False)
        return cast(tuple[Tensor, Tensor], output)  # A net may give any tree.
