"""Learning rates, momenta and weight decays by layer and by phase of one training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from metahpo.checks import refuse
from metahpo.errors import (
    CheckpointError,
    ConfigArgumentError,
    ConfigError,
    DataArgumentError,
    DataError,
    NetError,
    NonFiniteError,
    did_you_mean,
    one_line,
    shown,
)
from metahpo.functional import FunctionalModule
from metahpo.functional.copies import copied
from metahpo.functional.lending import kept
from metahpo.functional.module import Seen
from metahpo.functional.trees import Params
from metahpo.hypergrad import Hypergradient, Unroll
from metahpo.inner import SGD, Adam, AdamW, ByLayer, InnerProblem, Mixed, PerTensorRule, Reverse, named_remat
from metahpo.training.environment import seeded
from metahpo.training.first_batch import check_pairs
from metahpo.training.metrics import Row
from metahpo.training.schedules import cosine
from metahpo.training.settings import InnerGradientName, RematName, Settings
from metahpo.tuning.base import Tuner, check_loss, check_on_step, test
from metahpo.tuning.initial import InitialNets, NetOrFactory
from metahpo.tuning.network import WholeBatch
from metahpo.tuning.schedule import Rates

# Rates and decays are learnt as logarithms, what lies between 0 and 1 as logits: neither leaves its bounds.
_LOGITS = ("momentum", "beta1", "beta2")
Forward = Callable[[nn.Module, Any], Tensor]
# Sets the draws of initial weights apart from those of the batches.
_WEIGHTS = 1


class RatesSettings(Settings):
    """How the rates of one training are tuned by gradient."""

    rule: Literal["sgd", "adam", "adamw"] = Field(default="sgd", description="the optimizer of the training")
    tune: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="lr, momentum or beta1 and beta2, weight_decay; null: lr, and momentum or beta1",
    )
    by: Literal["all", "layer", "tensor"] = Field(
        default="layer", description="whose each value is: of the whole net, of a layer (weight and bias), of a tensor"
    )
    phases: int = Field(default=4, ge=1, description="parts of the training, each with values of its own")
    steps: int = Field(default=100, ge=1, description="of the training")
    batch: int = Field(default=50, ge=1, description="training examples a step")
    lr: float = Field(default=0.05, gt=0, description="the rate to begin with")
    momentum: float = Field(default=0.9, gt=0, lt=1, description="SGD's to begin with; Adam's beta1")
    weight_decay: float = Field(default=1e-4, ge=0, description="to begin with; 0: none")
    iterations: int = Field(default=60, ge=1, description="outer steps, each one training and its gradient")
    outer_lr: float = Field(default=0.1, gt=0, description="Adam's rate on log rates, log decays and logits of momenta")
    fresh: bool = Field(default=True, description="new initial weights in each outer step; false: the net's own")
    inner_gradient: InnerGradientName = "reverse"
    remat: RematName = "sqrt"
    seed: int = Field(default=0, ge=0)

    @field_validator("tune")
    @classmethod
    def _known(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        known = ("lr", "momentum", "beta1", "beta2", "weight_decay")
        for name in names or ():
            if name not in known:
                raise ValueError(f"no hyperparameter {name!r}; {did_you_mean(name, known)}")
        return names

    @model_validator(mode="after")
    def _phases_have_steps(self) -> RatesSettings:
        if self.phases > self.steps:
            raise ValueError(f"phases: found {self.phases}, expected at most the {self.steps} of steps")
        return self

    def tuned(self) -> tuple[str, ...]:
        return self.tune or ("lr", "momentum" if self.rule == "sgd" else "beta1")


def tune_rates(
    net: NetOrFactory,
    loss: Callable[[Tensor, Tensor], Tensor] | None,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    *,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    on_step: Callable[[Row], None] | None = None,
    **settings: Any,
) -> Rates:
    """Learns the rates (momenta, decays) with which ``net`` trains best in a given number of steps.

    Each outer step trains the net once, for ``steps`` steps from new initial weights, and moves the logarithms of the
    rates by Adam along the exact gradient of the loss on validation data after the last step (Maclaurin et al. 2015;
    Micaelli & Storkey 2021, who share rates over phases of the training as this does).

    net: any module of one input; copied, never changed. Or a function without parameters that
    builds it: new initial weights are then those of a net just built, under a seed, where otherwise
    its layers' ``reset_parameters`` draw them, and a net whose constructor draws others is refused.
    loss: (outputs, targets) -> scalar. train_loader, val_loader: ``DataLoader``s or other iterables
    of (inputs, targets), begun anew in every outer step: train gives the batches of the training
    (their size is the loader's), val one batch for its outcome. device: default that of the net.
    on_step: called with the figures of each outer step. settings: ``RatesSettings`` as keywords
    (steps, phases, tune, by, rule, iterations, ...).

    forward: in place of a loss (then None), for batches that are no pairs (dicts, triples): ``forward(net, batch)``
    gives the scalar loss of a batch as the loader gave it, its tensors on the device.

    Batch norm uses the batch's statistics in the validation loss too, where a net in evaluation mode has running ones.

    Raises ConfigError for a setting, NetError for a net that cannot be run, DataError for loaders without batches,
    NonFiniteError where the training diverges even at the rates that it begins with.
    """
    check_on_step(tune_rates, on_step)
    if "batch" in settings:
        raise ConfigError(f"batch: found {settings['batch']!r}, but the size of a batch is train_loader's")
    tuner = RatesTuner(net, loss, train_loader, val_loader, RatesSettings.of(**settings), device, forward)
    tuner.run(each=on_step)
    return tuner.result()


class RatesTuner(Tuner):
    """The outer steps of ``tune_rates``, which tells its arguments."""

    title = "tuning rates"

    def __init__(
        self,
        net: NetOrFactory,
        loss: Callable[[Tensor, Tensor], Tensor] | None,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any],
        settings: RatesSettings | None = None,
        device: torch.device | str | None = None,
        forward: Forward | None = None,
    ):
        check_loss(self, loss, forward)
        self.forward = forward
        self.settings = settings = settings or RatesSettings()
        super().__init__(settings.iterations)
        self.starts = InitialNets(net, settings.seed, device=device)
        self.net = self.starts.net
        names = [name for name, p in self.net.named_parameters() if p.requires_grad]
        if not names:
            raise NetError(f"{type(net).__name__} has no trainable parameter")
        self.device = next(self.net.parameters()).device
        self.loss, self.train, self.val = loss, train_loader, val_loader
        self.groups = _groups(names, settings.by)
        rows = {name: index for index, members in enumerate(self.groups.values()) for name in members}
        self._row = torch.tensor([rows[name] for name in names], device=self.device)
        rule = _rule(settings)
        self.rule = ByLayer(rule, names, settings.phases, settings.steps, learnable=False).to(self.device)
        own = {name: float(p) for name, p in rule.named_parameters()}
        for name in settings.tuned():
            if name not in own:
                has = ", ".join(key for key in own if key != "eps")
                why = "it begins at 0" if name == "weight_decay" else f"{settings.rule} has {has}"
                raise ConfigError(f"tune: found {name!r}, but {why}")
        shape = (len(self.groups), settings.phases)
        self.raw = {name: torch.full(shape, _inverse(name, own[name]), device=self.device) for name in settings.tuned()}
        self.before = {name: raw.clone() for name, raw in self.raw.items()}
        for raw in self.raw.values():
            raw.requires_grad_()
        self.fixed = {name: torch.full(shape, own[name], device=self.device) for name in own if name not in self.raw}
        self.optimizer = torch.optim.Adam(self.raw.values(), lr=settings.outer_lr, betas=(0.9, 0.99))
        gradient = Mixed() if settings.inner_gradient == "mixed" else Reverse()
        self.strategy = Unroll(gradient, named_remat(settings.remat))
        self._seen = Seen()
        self._check()

    def _check(self) -> None:
        """Raises NetError unless net and loss take the loaders' first batches and the weights can be drawn anew."""
        net = self.starts.checked(self.settings.seed) if self.settings.fresh else copied(self.net)
        with seeded(self.settings.seed, device=self.device), torch.no_grad():
            for what, loader in (("train_loader", self.train), ("val_loader", self.val)):
                if not isinstance(loader, Iterable) or isinstance(loader, str):
                    refuse(self, what, loader, "a DataLoader or another iterable of batches", DataArgumentError)
                batch = self._to(take(loader, 1, what)[0])
                _check_values(batch, what)
                try:
                    value = self._loss(net.eval(), batch)
                except Exception as error:
                    raise NetError(
                        f"{what}: {type(net).__name__} or the loss fails on {_described(batch)}: "
                        f"{type(error).__name__}: {one_line(error)}"
                    ) from error
                if not isinstance(value, Tensor) or value.dim():
                    found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise NetError(f"the loss gave {found}, expected a scalar tensor")
                if self.loss is not None:
                    check_pairs(what, self.loss, net(batch[0]), batch[1])

    def _loss(self, net: nn.Module, batch: Any) -> Tensor:
        return self.forward(net, batch) if self.forward else self.loss(net(batch[0]), batch[1])  # type: ignore[misc]

    def values(self) -> Params:
        """The learnt hyperparameters as they are now, [rows, phases] each; differentiable in ``raw``."""
        return {name: _forward(name, raw) for name, raw in self.raw.items()}

    def step(self) -> Row:
        settings = self.settings
        # The last steps are small: the figures that they end on are not those of one draw.
        self.optimizer.param_groups[0]["lr"] = cosine(self.iteration, self.iterations, settings.outer_lr, 0.0)
        with seeded(settings.seed, self.iteration, device=self.device):
            net = self.starts.draw(settings.seed, self.iteration, _WEIGHTS) if settings.fresh else self.net
            batches = [self._to(batch) for batch in take(self.train, settings.steps, "train_loader")]
            val = self._to(take(self.val, 1, "val_loader")[0])
            values, result = self._differentiated(net, batches, val)
        pulled = {name: result.grads[f"rule.{name}"] for name in values}
        sums = [torch.zeros_like(v).index_add_(0, self._row, pulled[name]) for name, v in values.items()]
        grads = torch.autograd.grad(list(values.values()), list(self.raw.values()), sums)
        for raw, grad in zip(self.raw.values(), grads):
            # Of length 1: a training at the edge of chaos now and then has a huge gradient, which Adam would remember.
            raw.grad = grad / grad.norm().clamp(min=1e-30)
        self.before = {name: raw.detach().clone() for name, raw in self.raw.items()}
        self.optimizer.step()
        row = {"val_loss": float(result.value), "train_loss": float(result.losses[-1])}
        return {**row, **{f"mean_{name}": float(value.detach().mean()) for name, value in values.items()}}

    def _differentiated(self, net: nn.Module, batches: list[Any], val: Any) -> tuple[Params, Hypergradient]:
        """The hyperparameters and the hypergradient at them; where the training diverges, at those before the last
        outer step, and then at halved rates."""
        # The rule knows the net's own names.
        prefix = "net." if self.forward else ""
        module = FunctionalModule(WholeBatch(net, self.forward) if self.forward else net)
        # The nets of all steps are alike: what the first one's calls showed holds for them.
        module.seen = self._seen

        def value(params: Params, batch: Any, buffers: Params, training: bool) -> tuple[Tensor, Params]:
            params = {f"{prefix}{name}": p for name, p in params.items()}
            inputs = batch if self.forward else batch[0]
            output, buffers = module.apply_with(params, buffers, inputs, training=training)
            return output if self.forward else self.loss(output, batch[1]), buffers  # type: ignore[misc]

        def inner_loss(params: Params, hparams: Params, batch: Any, buffers: Params) -> tuple[Tensor, Params]:
            return value(params, batch, buffers, True)

        problem = InnerProblem(inner_loss, module.buffers_by_name())
        params = {name.removeprefix(prefix): p.detach() for name, p in module.params().items()}

        def outcome(params: Params, hparams: Params, buffers: Params) -> Tensor:
            return value(params, kept(val), buffers, False)[0]

        for attempt in itertools.count():
            values = self.values()
            hparams = {f"rule.{name}": value.detach()[self._row] for name, value in values.items()}
            try:
                result = self.strategy(problem, self.rule, outcome, params, hparams, batches)
            except NonFiniteError as error:
                if "lr" not in self.raw or attempt == 5:
                    raise
                back = attempt == 0 and self.iteration > 0
                done = "the last outer step was taken back" if back else "all rates were halved"
                self.warnings[f"outer step {self.iteration + 1}: {error}; {done}"] = None
                with torch.no_grad():
                    for name, raw in self.raw.items():
                        raw.copy_(self.before[name] if back else raw - math.log(2) if name == "lr" else raw)
            else:
                return values, result
        raise AssertionError("unreachable")

    def _to(self, batch: Any) -> Any:
        if self.forward:
            return tree_map_only(Tensor, lambda t: t.to(self.device), batch)
        try:
            x, y = batch
            return x.to(self.device), y.to(self.device)
        except (TypeError, ValueError, AttributeError):
            raise DataError(
                f"a loader gave {type(batch).__name__}, expected pairs (inputs, targets); "
                "forward(net, batch) in place of loss takes any batch"
            ) from None

    def result(self) -> Rates:
        tuned = {name: value.detach().clone() for name, value in self.values().items()}
        order = [name for name, _ in self.rule.named_parameters()]
        both = {**self.fixed, **tuned}
        values = {name: both[name] for name in order}
        return Rates(
            self.settings.rule, self.groups, self.settings.steps, values, tuple(self.history), tuple(self.warnings)
        )

    def compare(self, x: Any, y: Tensor | None = None) -> dict[str, Row]:
        """The net trained by plain ``torch.optim`` with the learnt rates, and with those that the tuning began with;
        each three times from new initial weights, tested in evaluation mode.

        After a tuning by ``forward``, x may be a batch as its loaders give them, without y.
        """
        if y is None and self.forward is None:
            raise ConfigArgumentError("compare: found no y, which a tuning by loss needs")
        learnt = self.result()
        start = RatesTuner(
            self.starts.source, self.loss, self.train, self.val, self.settings, self.device, self.forward
        ).result()
        return {"tuned": self._trained(learnt, x, y), "initial rates": self._trained(start, x, y)}

    def _trained(self, rates: Rates, x: Any, y: Tensor | None, runs: int = 3) -> Row:
        rows = [self._tested(self.train_with(rates, run), x, y) for run in range(runs)]
        return {name: sum(row[name] for row in rows) / runs for name in rows[0]}

    def _tested(self, net: nn.Module, x: Any, y: Tensor | None) -> Row:
        if self.loss is not None:
            return test(net, self.loss, x, y)  # type: ignore[arg-type]
        with torch.no_grad():
            return {"loss": float(self._loss(net.eval(), self._to(kept(x if y is None else (x, y)))))}

    def train_with(self, rates: Rates, run: int) -> nn.Module:
        """The net trained by ``torch.optim`` for the settings' steps; run: a number that draws weights and batches."""
        # Apart from the outer steps' own numbers.
        seed = (self.settings.seed, self.iterations + run)
        with seeded(*seed, device=self.device):
            net = self.starts.draw(*seed, _WEIGHTS) if self.settings.fresh else copied(self.net)
            optimizer = rates.optimizer(net.train())
            scheduler = rates.scheduler(optimizer)
            for batch in take(self.train, self.settings.steps, "train_loader"):
                optimizer.zero_grad()
                self._loss(net, self._to(batch)).backward()
                optimizer.step()
                scheduler.step()
        return net

    def state_dict(self) -> dict[str, Any]:
        raw = {name: value.detach() for name, value in self.raw.items()}
        groups = {row: list(names) for row, names in self.groups.items()}
        return {"raw": raw, "before": self.before, "optimizer": self.optimizer.state_dict(), "groups": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved = state.get("groups", self.groups)  # The version before did not keep them.
        if list(saved.items()) != list(self.groups.items()):
            raise CheckpointError(
                f"state of the rates: its rows are {shown(list(saved), 300)}, expected "
                f"{shown(list(self.groups), 300)}, in the order in which the net defines them"
            )
        with torch.no_grad():
            for name, value in self.raw.items():
                value.copy_(state["raw"][name])
                self.before[name] = state["before"][name].to(self.device)
        self.optimizer.load_state_dict(state["optimizer"])


def take(loader: Iterable[Any], count: int, what: str) -> list[Any]:
    """The first ``count`` batches, from the start again where there are fewer; DataError if there is none."""
    found: list[Any] = []
    while len(found) < count:
        # As copies: a loader may fill the same memory again, and a net or loss write into what it gets.
        more = [kept(batch) for batch in itertools.islice(loader, count - len(found))]
        if not more:
            raise DataError(f"{what}: found no batch; expected a DataLoader, or a list of batches")
        found += more
    return found


def _check_values(batch: Any, what: str) -> None:
    """Raises DataArgumentError for a first batch that is empty or not finite."""
    for tensor in tree_leaves(batch):
        if isinstance(tensor, Tensor) and not tensor.numel():
            raise DataArgumentError(f"{what}: the first batch has no examples: found a tensor {list(tensor.shape)}")
        if isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
            raise DataArgumentError(f"{what}: the first batch holds NaN or infinite values")


def _described(batch: Any) -> str:
    if isinstance(batch, tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return f"inputs {list(batch[0].shape)} and targets {list(batch[1].shape)}"
    return f"a batch of type {type(batch).__name__}"


def _groups(names: list[str], by: str) -> dict[str, list[str]]:
    if by == "all":
        return {"all": names}
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name if by == "tensor" else name.rpartition(".")[0] or "(net)", []).append(name)
    return groups


def _rule(settings: RatesSettings) -> PerTensorRule:
    decay = settings.weight_decay or None
    if settings.rule == "sgd":
        return SGD(settings.lr, momentum=settings.momentum, weight_decay=decay)
    return {"adam": Adam, "adamw": AdamW}[settings.rule](settings.lr, settings.momentum, weight_decay=decay)


def _inverse(name: str, value: float) -> float:
    return math.log(value / (1 - value)) if name in _LOGITS else math.log(value)


def _forward(name: str, raw: Tensor) -> Tensor:
    # In float32 the logistic function reaches 1 at 17.
    return raw.clamp(max=10.0).sigmoid() if name in _LOGITS else raw.exp()
