"""An ordinary training as an objective that gives the gradient of its score too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from metahpo.errors import NetError, NonFiniteError, SearchError, did_you_mean
from metahpo.functional import FunctionalModule
from metahpo.functional.copies import copied
from metahpo.functional.trees import Params
from metahpo.hypergrad import Strategy, Unroll
from metahpo.inner import SGD, ByLayer, InnerProblem, PerTensorRule, Scheduled, UpdateRule
from metahpo.inner.problem import RULE, split
from metahpo.searchers.outcome import Outcome
from metahpo.searchers.trial import Trial
from metahpo.training.environment import seeded
from metahpo.tuning.data import Labelled, labelled, minibatches

TrainLoss = Callable[[Tensor, Tensor, Params, Params], Tensor]
# For each of the rule's hyperparameters that is set: the setting that each tensor takes it from, or None.
Sources = Mapping[str, Sequence[str | None]]


class HypergradientObjective:
    """Trains ``net`` by ``rule``; the score is the loss on ``val`` after the last step, with its gradient.

    net: any module of one input; copied, never changed; every trial begins with its weights. loss: (outputs, targets)
    -> scalar. train, val: what ``metahpo.tuning.data.labelled`` takes. rule: the optimizer (default: SGD of rate 0.1,
    momentum 0.9 and decay 1e-4), whose values hold for what is not set. steps: of the training; batch: training
    examples a step, drawn by ``seed``, the same ones in each trial: only the settings tell two trials apart. schedule:
    factors of the rate, each for an equal share of the steps.

    A setting has the name of a hyperparameter of the rule, for the whole net ("lr", "weight_decay") or a part of it:
    "lr.layers.1" is for the tensors whose names begin with layers.1; of several such settings the longest name counts.
    Any other setting is the loss's own: ``train_loss(outputs, targets, params, hparams)``, which the training then
    minimises in place of ``loss``, finds it in ``hparams`` as a scalar tensor.

    gradients: False gives the score alone, of a plain training. strategy: how the gradient is had; ``Unroll()`` takes
    about three plain trainings for any number of settings. Where the gradient is not finite but the score is, the score
    stands alone. Batch norm uses the batch's statistics in the score too.

    Raises NetError for a net without trainable parameters or a rule without scalars of its own; in a trial SearchError
    for a setting that nothing has, NonFiniteError where the training diverges: the trial has failed.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        train: Any,
        val: Any,
        rule: PerTensorRule | None = None,
        *,
        steps: int = 100,
        batch: int = 50,
        schedule: Sequence[float] | None = None,
        train_loss: TrainLoss | None = None,
        gradients: bool = True,
        strategy: Strategy = Unroll(),
        seed: int = 0,
    ):
        self.module = FunctionalModule(net)
        self.weights = {name: p.detach() for name, p in self.module.params().items()}
        if not self.weights:
            raise NetError(f"{type(net).__name__} has no trainable parameter")
        like = next(iter(self.weights.values()))
        self.rule = copy.deepcopy(rule or SGD(0.1, momentum=0.9, weight_decay=1e-4)).to(like).requires_grad_(False)
        ByLayer(self.rule, self.weights)  # Which checks the rule.
        self.loss, self.train_loss = loss, train_loss
        self.train, self.val = labelled(train, "train").to(like.device), labelled(val, "val").to(like.device)
        self.steps, self.batch, self.schedule, self.seed = steps, batch, schedule, seed
        self.gradients, self.strategy = gradients, strategy

    def __call__(self, trial: Trial) -> Outcome:
        return self.outcome(trial.settings)

    def outcome(self, settings: Mapping[str, float]) -> Outcome:
        """What a trial with these settings gives."""
        if self.gradients and settings:
            try:
                return self._differentiated(settings)
            except NonFiniteError:
                # Of a training at the edge of chaos the score may be finite where its gradient is not.
                pass
        with torch.no_grad():
            return Outcome(float(self.loss(self.fitted(settings)(self.val.x.clone()), self.val.y.clone())))

    def fitted(self, settings: Mapping[str, float]) -> nn.Module:
        """The net after the training with these settings, in evaluation mode."""
        rule, hparams, _ = self._given(settings)
        others, own = split(hparams)
        rule.load_state_dict({**rule.state_dict(), **own})
        net = copied(self.module).train().net
        params = {name: p for name, p in net.named_parameters() if p.requires_grad}
        state = rule.init(params)
        with seeded(self.seed, device=self.val.x.device):
            for step, (x, y) in enumerate(self._batches()):
                with torch.enable_grad():
                    value = self._minimised(net(x), y, params, others)
                    found = torch.autograd.grad(value, list(params.values()), allow_unused=True)
                if not bool(torch.isfinite(value)):
                    raise NonFiniteError(f"the training diverged: its loss is {float(value)} at step {step + 1}")
                with torch.no_grad():
                    new, state = rule(params, dict(zip(params, found)), state, step)
                    for name, p in params.items():
                        p.copy_(new[name])
        return net.eval()

    def _differentiated(self, settings: Mapping[str, float]) -> Outcome:
        rule, hparams, sources = self._given(settings)

        def inner(params: Params, hparams: Params, batch: Labelled, buffers: Params) -> tuple[Tensor, Params]:
            outputs, buffers = self.module.apply_with(params, buffers, batch.x)
            return self._minimised(outputs, batch.y, params, hparams), buffers

        def outer(params: Params, hparams: Params, buffers: Params) -> Tensor:
            outputs, _ = self.module.apply_with(params, buffers, self.val.x, training=False)
            return self.loss(outputs, self.val.y.clone())

        problem = InnerProblem(inner, self.module.buffers_by_name())
        with seeded(self.seed, device=self.val.x.device):
            found = self.strategy(problem, rule, outer, self.weights, hparams, list(self._batches()))
        gradients = {name: float(found.grads[name]) for name in split(hparams)[0]}
        for name, value in split(found.grads)[1].items():
            for source, grad in zip(sources[name], value.flatten().tolist()):
                if source is not None:
                    gradients[source] = gradients.get(source, 0.0) + grad
        return Outcome(float(found.value), gradients)

    def _minimised(self, outputs: Tensor, y: Tensor, params: Params, hparams: Params) -> Tensor:
        return self.train_loss(outputs, y, params, hparams) if self.train_loss else self.loss(outputs, y)

    def _batches(self) -> Iterator[Labelled]:
        return islice(minibatches(self.train, self.batch, torch.Generator().manual_seed(self.seed)), self.steps)

    def _given(self, settings: Mapping[str, float]) -> tuple[UpdateRule, Params, Sources]:
        """The rule, the hyperparameters as a strategy takes them, and what those of the rule come from."""
        own = dict(self.rule.named_parameters())
        heads = {name: name.partition(".")[0] for name in settings}
        values = {name: self._value(name, value, heads[name], own) for name, value in settings.items()}
        hparams = {name: value for name, value in values.items() if heads[name] not in own}
        rule: UpdateRule = copy.deepcopy(self.rule)
        by_layer = any(name not in own and name not in hparams for name in settings)
        if by_layer:
            rule = ByLayer(self.rule, self.weights, learnable=False)
        prefix = RULE
        if self.schedule is not None:
            every = -(-self.steps // len(self.schedule))
            rule, prefix = Scheduled(rule, self.schedule, every, learnable=False), prefix + RULE
        rule.to(self.val.x.device, next(iter(self.weights.values())).dtype)
        sources: dict[str, Sequence[str | None]] = {}
        for head in dict.fromkeys(head for head in heads.values() if head in own):
            names = [name for name in settings if heads[name] == head]
            from_ = [_source(head, tensor, names) for tensor in self.weights] if by_layer else names
            rows = [own[head] if name is None else values[name] for name in from_]
            hparams[prefix + head] = torch.stack(rows)[:, None] if by_layer else rows[0]
            sources[(prefix + head).removeprefix(RULE)] = from_
        return rule, hparams, sources

    def _value(self, name: str, value: Any, head: str, own: Params) -> Tensor:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise SearchError(f"setting {name!r}: found {value!r}, expected a number")
        if head not in own and self.train_loss is None:
            found = f"{type(self.rule).__name__} has no hyperparameter {head!r}"
            raise SearchError(f"setting {name!r}: {found}; {did_you_mean(head, own)}")
        if head in own and name != head and not any(_source(head, tensor, [name]) for tensor in self.weights):
            part = name.partition(".")[2]
            found = f"no tensor of {type(self.module.net).__name__} is in {part!r}"
            raise SearchError(f"setting {name!r}: {found}; {did_you_mean(part, self.weights)}")
        return next(iter(self.weights.values())).new_tensor(value)


def _source(head: str, tensor: str, names: Sequence[str]) -> str | None:
    """The setting with the longest name among those that a tensor takes the hyperparameter ``head`` from."""
    fit = [name for name in names if f"{head}.{tensor}.".startswith(f"{name}.")]
    return max(fit, key=len, default=None)
