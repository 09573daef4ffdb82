"""Weight decay by gradient, while the net trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from metahpo.checks import check_type
from metahpo.errors import ConfigError, NetArgumentError, NetError, NonFiniteError
from metahpo.functional.lending import Lent
from metahpo.functional.module import FunctionalModule
from metahpo.functional.trees import Params
from metahpo.hypergrad.base import InnerState
from metahpo.hypergrad.implicit import Implicit
from metahpo.hypergrad.solvers import Neumann, Product, Solution
from metahpo.inner.problem import InnerProblem
from metahpo.training.environment import seeded
from metahpo.training.metrics import Row
from metahpo.tuning.base import Tuner, by_name, check_loss, check_on_step, test
from metahpo.tuning.data import Examples, Labelled, labelled, read_once
from metahpo.tuning.decay_result import ALL, Decay
from metahpo.tuning.network import Loss, WholeBatch, check_fits, device_for, with_weights
from metahpo.tuning.settings import DecaySettings

# In front of the names of hyperparameters, as a net may have a part named "rule".
DECAY = "decay."
_CONVERGED = 1e-2
Forward = Callable[[nn.Module, Any], Tensor]


def tune_decay(
    net: nn.Module,
    loss: Loss | None,
    train: Any,
    val: Any,
    *,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    on_step: Callable[[Row], None] | None = None,
    **settings: Any,
) -> Decay:
    """Trains a copy of the net and tunes its weight decay on the way, by gradient (Lorraine et al. 2020, algorithm 1).

    The training minimises ``loss(net(x), y) + 0.5 * sum of exp(h) w^2`` with a decay exp(h) for the whole net, for each
    parameter tensor or for each scalar weight w; after every few steps Adam moves the h against the gradient of the
    validation loss, had by the implicit function theorem with a short Neumann series. exp(h) is what ``weight_decay``
    means in ``torch.optim.SGD`` and ``Adam`` (not the decoupled one of ``AdamW``).

    net: any module; it is not changed. Batch norm trains as usual, and takes its statistics from the batch in the
    validation loss too. loss: of outputs and targets, a mean. train, val: a ``Dataset``, a ``DataLoader`` or a pair of
    tensors (``labelled``), which are held in memory. device: default that of the net. on_step: called with the figures
    of each update. settings: ``DecaySettings`` as keywords (by, steps, every, ...).

    forward: in place of a loss (then None), for examples that are no pairs (dicts, triples): ``forward(net, batch)``
    gives the mean loss of a batch; train and val are then a ``Dataset``, a ``DataLoader``, or a dict or tuple of
    tensors.

    A decay by parameter can fit thousands of validation examples as a net fits its training set (section 5.1 there):
    judge the result by data that neither saw.

    Raises ConfigError for settings, DataError and NetError for what does not fit, NonFiniteError for a training that
    diverges.
    """
    check_on_step(tune_decay, on_step)
    tuner = DecayTuner(net, loss, train, val, DecaySettings.of(**settings), device, forward)
    tuner.run(each=on_step)
    return tuner.result()


class DecayTuner(Tuner):
    """``tune_decay`` a step at a time; a step is ``every`` steps of training and one update of the decays."""

    title = "decay"

    def __init__(
        self,
        net: nn.Module,
        loss: Loss | None,
        train: Any,
        val: Any,
        settings: DecaySettings = DecaySettings(),
        device: torch.device | str | None = None,
        forward: Forward | None = None,
    ):
        check_loss(self, loss, forward)
        self.forward, self._prefix = forward, "net." if forward else ""
        check_type(self, "net", net, nn.Module, "a torch.nn.Module", error=NetArgumentError)
        super().__init__(-(-settings.steps // settings.every))
        self.settings, self.device = settings, device_for(net, device)
        self.loss = loss and Lent(loss, 1, "the loss")
        parts = ((train, "train"), (val, "val"))
        read: Callable[..., Any] = _examples if forward else partial(labelled, whole=True)
        self.train, self.val = (read_once(d, name, read, settings.seed).to(self.device) for d, name in parts)
        if not forward:
            check_fits(net, self.device, train=self.train, val=self.val)
        self.net = net
        self.module = FunctionalModule(WholeBatch(net, forward) if forward else net).to(self.device)
        params = {name.removeprefix(self._prefix): p for name, p in self.module.params().items()}
        self.params = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        self.buffers = {name.removeprefix(self._prefix): b.clone() for name, b in self.module.buffers_by_name().items()}
        self.logs = {DECAY + name: h for name, h in _logs(self.params, settings).items()}
        self.optimizer = _optimizer(self.params, settings)
        self.outer = torch.optim.Adam(self.logs.values(), settings.decay_lr)
        self.problem = InnerProblem(self._inner_loss)
        self.residuals: list[float] = []

    def step(self) -> Row:
        s = self.settings
        with seeded(s.seed, self.iteration, device=self.device):
            count = min(s.every, s.steps - self.iteration * s.every)
            train_loss = self._train(count)
            residual, val_loss = self._update_decays()
        self.residuals.append(residual)
        mean_log = torch.cat([h.flatten() for h in self.logs.values()]).mean()
        return {"val_loss": val_loss, "train_loss": train_loss, "decay": float(mean_log.exp()), "residual": residual}

    def _train(self, count: int) -> float:
        """Makes steps of the ordinary training, in place; the mean of their losses, without decay."""
        decays = [self._decay(self.logs, name) for name in self.params]
        params, total = list(self.params.values()), torch.zeros((), device=self.device)
        for _ in range(count):
            value, self.buffers = self._value(self.params, _draw(self.train, self.settings.batch), True)
            if not isinstance(value, Tensor):
                raise NetError(f"loss gave {type(value).__name__}, expected a scalar tensor")
            if value.dim():
                raise NetError(f"loss gave a tensor {list(value.shape)}, expected a scalar; take its mean")
            grads = torch.autograd.grad(value, params, materialize_grads=True)
            with torch.no_grad():
                for p, grad, decay in zip(params, grads, decays):
                    # As torch.optim adds weight_decay * p.
                    p.grad = torch.addcmul(grad, decay.expand_as(p), p)
                self.optimizer.step()
            total += value.detach()
        mean = float(total) / count
        if not mean < float("inf"):
            raise NonFiniteError(
                f"the training diverged: its mean loss is {mean} in the {count} steps before update "
                f"{self.iteration + 1} of the decays; lower lr"
            )
        return mean

    def _update_decays(self) -> tuple[float, float]:
        """Moves the decays; (relative residual of the Neumann series, validation loss of the batch)."""
        s = self.settings
        series = NeumannSeries(s.terms, s.scale)
        batch, val_batch = _draw(self.train, s.batch), _draw(self.val, s.val_batch)

        def outer_loss(params: Params, hparams: Params) -> Tensor:
            return self._value(params, val_batch, False)[0]

        # With a state there is no look for what would be silently wrong: the losses are not the user's, and it would
        # cost as much as a step and draw random numbers.
        found = Implicit(series, warm_start=False).hypergradient_at(
            self.problem, None, outer_loss, self.params, self.logs, [batch], InnerState(None, 0)
        )
        for name, h in self.logs.items():
            h.grad = found.grads[name]
        self.outer.step()
        with torch.no_grad():
            for h in self.logs.values():
                h.clamp_(max=math.log(self.settings.max_decay))
        return float(series.residual), float(found.value)

    def _inner_loss(self, params: Params, hparams: Params, batch: Labelled) -> Tensor:
        value, _ = self._value(params, batch, True)
        decayed = [(self._decay(hparams, name) * p.square()).sum() for name, p in params.items()]
        return value + 0.5 * torch.stack(decayed).sum()

    def _value(self, params: Params, batch: Any, training: bool) -> tuple[Tensor, Params]:
        """(loss of the batch, new buffers); the net's own names are without the prefix."""
        if self.forward is None:
            out, buffers = self.module.apply_with(params, self.buffers, batch.x, training=training)
            return self.loss(out, batch.y), buffers  # type: ignore[misc]
        params, buffers = ({self._prefix + name: t for name, t in own.items()} for own in (params, self.buffers))
        value, buffers = self.module.apply_with(params, buffers, batch.tree, training=training)
        return value, {name.removeprefix(self._prefix): b for name, b in buffers.items()}

    def _decay(self, logs: Params, name: str) -> Tensor:
        return logs[DECAY + (ALL if self.settings.by == "all" else name)].exp()

    def result(self) -> Decay:
        warnings = list(self.warnings)
        if self.residuals and max(self.residuals) > _CONVERGED:
            middle = sorted(self.residuals)[len(self.residuals) // 2]
            warnings.append(
                f"Neumann series: {self.settings.terms} terms left a relative residual of {middle:.2g} (median of "
                f"{len(self.residuals)} updates; largest {max(self.residuals):.2g}): the gradients look no further "
                "ahead than so many steps; more terms do, and a residual above 1 wants a lower scale"
            )
        logs = {name.removeprefix(DECAY): h.detach().clone() for name, h in self.logs.items()}
        net = with_weights(self.net, self.params, self.buffers)
        return Decay(self.settings.by, logs, net, tuple(self.history), tuple(warnings))

    def compare(self, x: Tensor, y: Tensor) -> dict[str, Row]:
        """ "tuned": the tuned net; "retrained": the net from its beginning with the final decays; "untuned": with the
        decays that the tuning began at. All with the same steps and batches."""
        if self.loss is None:
            raise ConfigError("compare: found a tuning by forward, expected one by loss")
        data = labelled((x, y), "test", whole=True).to(self.device)
        check_fits(self.net, self.device, test=data)
        start = {name: torch.full_like(h, self.settings.decay).log() for name, h in self.logs.items()}
        nets = {
            "tuned": with_weights(self.net, self.params, self.buffers),
            "retrained": self._trained_with({name: h.detach().clone() for name, h in self.logs.items()}),
            "untuned": self._trained_with(start),
        }
        return {name: test(net.to(self.device), self.loss, data.x, data.y) for name, net in nets.items()}

    def _trained_with(self, logs: Params) -> nn.Module:
        """The net after the training with these decays, which stay."""
        loss = self.loss and self.loss.function
        other = DecayTuner(self.net, loss, self.train, self.val, self.settings, self.device, self.forward)
        other.logs = logs
        for other.iteration in range(self.iterations):
            s = self.settings
            with seeded(s.seed, other.iteration, device=self.device):
                other._train(min(s.every, s.steps - other.iteration * s.every))
        return with_weights(self.net, other.params, other.buffers)

    def state_dict(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "history": [dict(row) for row in self.history],
            "warnings": list(self.warnings),
            "residuals": list(self.residuals),
            "params": {name: p.detach().clone() for name, p in self.params.items()},
            "buffers": {name: b.clone() for name, b in self.buffers.items()},
            "logs": {name: h.detach().clone() for name, h in self.logs.items()},
            "optimizer": self.optimizer.state_dict(),
            "outer": self.outer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.iteration, self.residuals = state["iteration"], list(state["residuals"])
        self.history, self.warnings = [dict(row) for row in state["history"]], dict.fromkeys(state["warnings"])
        with torch.no_grad():
            for own, saved in ((self.params, state["params"]), (self.logs, state["logs"])):
                for name, tensor in own.items():
                    tensor.copy_(saved[name])
        self.buffers = {name: b.to(self.device) for name, b in state["buffers"].items()}
        # A net may define its layers in another order now.
        self.optimizer.load_state_dict(by_name(state["optimizer"], state["params"], self.params))
        self.outer.load_state_dict(by_name(state["outer"], state["logs"], self.logs))


@dataclass
class NeumannSeries:
    """``Neumann`` that keeps its last residual, which a tuning tells once and not at every update."""

    terms: int
    scale: float
    residual: Tensor = field(default_factory=lambda: torch.tensor(0.0))

    system: ClassVar[Literal["hessian", "map"]] = "hessian"
    advice: ClassVar[str] = "lower scale or max_decay"

    def __call__(self, product: Product, rhs: Tensor, start: Tensor | None = None) -> Solution:
        found = Neumann(self.terms, self.scale, tolerance=float("inf"))(product, rhs, start)
        self.residual = found.residual
        return found


def _logs(params: Params, settings: DecaySettings) -> Params:
    """The logarithms of the decays at the beginning."""
    first = next(iter(params.values()))
    start = torch.tensor(settings.decay, dtype=first.dtype, device=first.device).log()
    if settings.by == "all":
        return {ALL: start}
    shapes = {name: p.shape if settings.by == "parameter" else () for name, p in params.items()}
    return {name: start.to(params[name].dtype).expand(shape).clone() for name, shape in shapes.items()}


def _optimizer(params: Params, settings: DecaySettings) -> torch.optim.Optimizer:
    if settings.optimizer == "adam":
        return torch.optim.Adam(params.values(), settings.lr)
    return torch.optim.SGD(params.values(), settings.lr, settings.momentum)


def _examples(data: Any, what: str) -> Examples:
    return data if isinstance(data, Examples) else Examples(data, what)


def _draw(data: Any, size: int) -> Any:
    """So many examples, each at most once, by the generator that is seeded now."""
    count = len(data) if isinstance(data, Examples) else len(data.x)
    if size >= count:
        return data
    return data.select(torch.randperm(count)[:size])
