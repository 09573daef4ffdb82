"""Hyper-cleaning: a weight for every training example, by gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from metahpo.errors import ConfigArgumentError, DataArgumentError, DataError
from metahpo.functional.module import FunctionalModule
from metahpo.functional.trees import Params
from metahpo.hypergrad.unroll import Unroll
from metahpo.inner.problem import InnerProblem
from metahpo.inner.rules.sgd import SGD
from metahpo.nets.mlp import MLP
from metahpo.training.environment import seeded
from metahpo.training.metrics import Row
from metahpo.tuning.base import Tuner, check_on_step, test
from metahpo.tuning.cleaning_result import Cleaned
from metahpo.tuning.data import Labelled, labelled, read_once
from metahpo.tuning.initial import InitialNets, NetOrFactory
from metahpo.tuning.network import check_fits, device_for, with_weights
from metahpo.tuning.second_look import SecondLook, second_look
from metahpo.tuning.settings import CleaningSettings

LOGITS = "logits"
# Keep the streams of random numbers apart.
_BATCHES, _START, _LOOK = 0, 1, 2


def clean(
    dataset: Any,
    trusted: Any,
    *,
    net: NetOrFactory | None = None,
    device: torch.device | str | None = None,
    on_step: Callable[[Row], None] | None = None,
    **settings: Any,
) -> Cleaned:
    """Finds the training examples whose labels do harm (hyper-cleaning: Franceschi et al. 2017, section 5.2).

    Every example has a weight sigmoid(a); a net is trained for a few steps on the cross-entropy, weighted and divided
    by the mean weight, and Adam moves the a against the gradient of its cross-entropy on the trusted examples, taken
    through all these steps; this is repeated with other initial weights of the net.

    These weights say what helps the trusted examples, which is not whether a label is right: where few are wrong, half
    of the right ones get a low weight too. So nets that are trained with them, and others that learn hardly more than
    the trusted examples, look again at labels that they have not seen (``second_look``), and what they say decides. All
    examples are kept where to leave the suspected ones out does harm to the loss of unseen trusted examples, beyond its
    standard error.

    dataset, trusted: classified examples, as a ``Dataset``, a ``DataLoader`` that does not shuffle, or a pair of
    tensors (``labelled``); trusted ones are right, and should hold every class, some tens of times. net: gives logits,
    or a function without parameters that builds such a net, which then draws its initial weights itself; by default a
    linear one, which overfits the trusted examples least. device: default that of the net. on_step: called
    with the figures of each update. settings: ``CleaningSettings`` as keywords (iterations, steps, ...).

    Raises ConfigError for settings, DataError and NetError for what does not fit, NonFiniteError for a training that
    diverges.
    """
    if "forward" in settings:
        raise ConfigArgumentError(
            "clean: takes no forward: it judges labels by the logits of each example; give pairs (examples, labels) "
            "and a net that gives logits [N, classes] of the examples"
        )
    check_on_step(clean, on_step)
    tuner = CleaningTuner(dataset, trusted, net, CleaningSettings.of(**settings), device)
    tuner.run(each=on_step)
    return tuner.result()


class CleaningTuner(Tuner):
    """``clean`` a step at a time; a step is one short training and one update of the weights."""

    title = "cleaning"

    def __init__(
        self,
        dataset: Any,
        trusted: Any,
        net: NetOrFactory | None = None,
        settings: CleaningSettings = CleaningSettings(),
        device: torch.device | str | None = None,
    ):
        super().__init__(settings.iterations)
        self.settings = settings
        parts = ((dataset, "dataset"), (trusted, "trusted"))
        read = partial(labelled, whole=True)
        self.data, self.trusted = (read_once(d, what, read, settings.seed) for d, what in parts)
        if isinstance(dataset, DataLoader) and not (_in_order(dataset) and len(self.data.x) == len(dataset.dataset)):
            raise DataError(
                "dataset: found a DataLoader that shuffles, draws or leaves examples out, so that they have no "
                "numbers; give its dataset"
            )
        for what, data in (("dataset", self.data), ("trusted", self.trusted)):
            if data.y.is_floating_point():
                raise DataArgumentError(f"{what}: found targets of {data.y.dtype}, expected labels of classes")
        if net is None:
            classes = max(self.data.classes, self.trusted.classes)
            with seeded(settings.seed, _START):
                net = MLP(self.data.x.shape[1:], classes, ()).to(self.data.x.dtype)
        self.starts = InitialNets(net, settings.seed)
        net = self.starts.net
        if settings.fresh:
            self.starts.checked(settings.seed, _START)
        self.device = device_for(net, device)
        check_fits(net, self.device, dataset=self.data, trusted=self.trusted)
        self.data, self.trusted = self.data.to(self.device), self.trusted.to(self.device)
        self.net = net
        self.module = FunctionalModule(net).to(self.device)
        # An example that no gradient reaches stays at weight 1/2, which the default threshold does not suspect.
        self.logits = torch.zeros(len(self.data.x), dtype=_dtype(net), device=self.device)
        self.optimizer = torch.optim.Adam([self.logits], settings.weight_lr)
        self._looked: tuple[Tensor, SecondLook] | None = None
        self.rule = SGD(settings.lr, momentum=settings.momentum).to(self.device)

    def step(self) -> Row:
        s = self.settings
        with seeded(s.seed, _BATCHES, self.iteration, device=self.device):
            batches = [self._batch() for _ in range(s.steps)]
            start = self._start()
            problem = InnerProblem(self._weighted_loss, start.buffers_by_name())
            hparams = {LOGITS: self.logits}
            found = Unroll()(problem, self.rule, self._trusted_loss, start.params(), hparams, batches)
        self.warnings.update(dict.fromkeys(found.warnings))
        self.logits.grad = found.grads[LOGITS]
        self.optimizer.step()
        low = (torch.sigmoid(self.logits) < s.threshold).double().mean()
        return {"val_loss": float(found.value), "train_loss": float(found.losses[-1]), "low_weight": float(low)}

    def _start(self) -> FunctionalModule:
        """The net that this step trains."""
        if not self.settings.fresh:
            return self.module
        net = self.starts.draw(self.settings.seed, _START, self.iteration)
        return FunctionalModule(net).to(self.device)

    def _batch(self) -> tuple[Labelled, Tensor]:
        """(examples, their numbers)."""
        count, size = len(self.data.x), self.settings.batch
        if size is None or size >= count:
            return self.data, torch.arange(count, device=self.device)
        which = torch.randperm(count)[:size].to(self.device)
        return self.data.select(which), which

    def _weighted_loss(
        self, params: Params, hparams: Params, batch: tuple[Labelled, Tensor], buffers: Params
    ) -> tuple[Tensor, Params]:
        (x, y), which = batch
        weights = torch.sigmoid(hparams[LOGITS])
        out, buffers = self.module.apply_with(params, buffers, x)
        # By the mean weight of all, so that weights compete and the rate of the training does not fall with them.
        return (weights[which] * F.cross_entropy(out, y, reduction="none")).mean() / weights.mean(), buffers

    def _trusted_loss(self, params: Params, hparams: Params, buffers: Params) -> Tensor:
        out, _ = self.module.apply_with(params, buffers, self.trusted.x, training=False)
        return F.cross_entropy(out, self.trusted.y)

    def result(self) -> Cleaned:
        weights, look = torch.sigmoid(self.logits), self._second_look()
        return Cleaned(
            look.right.to(weights),
            self.settings.threshold,
            self.data,
            tuple(self.history),
            tuple(self.warnings),
            gradient_weights=weights,
            suggested=look.suggested,
            gain=look.gain,
            error=look.error,
        )

    def _second_look(self) -> SecondLook:
        """What the nets say of the labels by the weights as they are."""
        if self._looked is None or not torch.equal(self._looked[0], self.logits):
            weights = torch.sigmoid(self.logits).double()
            threshold = self.settings.threshold

            def train(data: Labelled, weights: Tensor, number: int) -> Callable[[Tensor], Tensor]:
                net = self._trained(data, weights, (self.settings.seed, _LOOK, number))
                return torch.no_grad()(net)

            look = second_look(self.data, self.trusted, weights, threshold, train)
            self._looked = self.logits.clone(), look
        return self._looked[1]

    def compare(self, x: Tensor, y: Tensor) -> dict[str, Row]:
        """ "kept": trained on the examples that are not suspected; "all": on all of them; both with the trusted ones
        besides, from the same initial weights and as in the tuning but for 5 times as many steps."""
        data = labelled((x, y), "test", whole=True).to(self.device)
        check_fits(self.net, self.device, test=data)
        kept = self.result().kept
        parts = {"kept": self.data.select(kept), "all": self.data}
        return {name: test(self.trained(part), F.cross_entropy, data.x, data.y) for name, part in parts.items()}

    def trained(self, data: Labelled) -> nn.Module:
        """The net after an ordinary training on these examples and the trusted ones, as ``compare`` makes it."""
        data = Labelled(torch.cat([data.x, self.trusted.x]), torch.cat([data.y, self.trusted.y]))
        return self._trained(data, None, (self.settings.seed, _BATCHES))

    def _trained(self, data: Labelled, weights: Tensor | None, seed: tuple[int, ...]) -> nn.Module:
        """The net after an ordinary training on the weighted examples; seed: of its batches."""
        s = self.settings
        if weights is not None:
            weights = (weights / weights.mean()).to(self.logits)
        net = self.starts.draw(s.seed, _START) if s.fresh else self.net
        module = FunctionalModule(net).to(self.device)
        params = {name: p.detach().clone().requires_grad_() for name, p in module.params().items()}
        buffers = {name: b.clone() for name, b in module.buffers_by_name().items()}
        optimizer = torch.optim.SGD(params.values(), s.lr, s.momentum)
        with seeded(*seed, device=self.device):
            for _ in range(5 * s.steps):
                which = torch.randperm(len(data.x))[: s.batch].to(self.device)
                out, buffers = module.apply_with(params, buffers, data.x[which])
                optimizer.zero_grad()
                if weights is None:
                    F.cross_entropy(out, data.y[which]).backward()
                else:
                    losses = F.cross_entropy(out, data.y[which], reduction="none")
                    (weights[which] * losses).mean().backward()
                optimizer.step()
        return with_weights(net, params, buffers).to(self.device)

    def state_dict(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "history": [dict(row) for row in self.history],
            "warnings": list(self.warnings),
            "logits": self.logits.detach().clone(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.iteration, self.history = state["iteration"], [dict(row) for row in state["history"]]
        self.warnings = dict.fromkeys(state["warnings"])
        self.logits.copy_(state["logits"])
        self.optimizer.load_state_dict(state["optimizer"])


def _in_order(loader: DataLoader) -> bool:
    """Whether it gives the examples of its dataset by their numbers, as far as its parts tell."""
    if type(loader).__iter__ is not DataLoader.__iter__ or isinstance(loader.dataset, IterableDataset):
        return False
    sampler: Any = loader.sampler
    if loader.batch_sampler is not None:
        if type(loader.batch_sampler) is not BatchSampler or loader.batch_sampler.drop_last:
            return False
        sampler = loader.batch_sampler.sampler
    return type(sampler) is SequentialSampler or (isinstance(sampler, range) and sampler == range(len(loader.dataset)))


def _dtype(net: nn.Module) -> torch.dtype:
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
