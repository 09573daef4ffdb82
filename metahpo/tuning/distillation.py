"""Dataset distillation: a few synthetic images on which a net learns in a few steps what the whole data set teaches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metahpo.errors import CheckpointError, DataError
from metahpo.functional.copies import copied
from metahpo.functional.trees import Params
from metahpo.hypergrad.base import Hypergradient
from metahpo.hypergrad.unroll import Unroll
from metahpo.nets import MLP
from metahpo.training.environment import seeded
from metahpo.training.metrics import Row
from metahpo.tuning.base import Tuner
from metahpo.tuning.data import Labelled, labelled, read_once
from metahpo.tuning.distillation_compare import compared
from metahpo.tuning.distillation_settings import DistillationSettings
from metahpo.tuning.distilled import Distilled
from metahpo.tuning.image_training import IMAGES, LOG_RATES, ImageTraining
from metahpo.tuning.initial import InitialNets, NetOrFactory


def distill(
    dataset: Any,
    images_per_class: int = 1,
    net: NetOrFactory | None = None,
    *,
    validation: Any = None,
    **settings: Any,
) -> Distilled:
    """Learns ``images_per_class`` synthetic images of every class, and the rates of an inner training on them, such
    that the net fits the data set after that training (Wang et al. 2018, arXiv 1811.10959, algorithm 1).

    dataset: images [N, C, H, W] with labels from 0 on (a ``Dataset``, a ``DataLoader``, a pair of tensors); net: takes
    them to logits, is copied, and tells the device, or a function without parameters that builds such a net, which then
    draws its initial weights itself (default: an MLP with 64 hidden units, drawn from ``seed``);
    validation: held-out data whose accuracy is recorded after every outer step; settings: of ``DistillationSettings``
    by name.

    The hypergradient is exact, through every inner step. The net is in evaluation mode throughout: batch normalisation
    keeps its running statistics, and dropout is off.

    Raises ConfigError for a bad setting, DataError for data that do not fit, NetError for a net whose outputs do not
    fit or (init="random") whose weights cannot be drawn anew, NonFiniteError where the inner training diverges.
    """
    chosen = DistillationSettings.of(images_per_class=images_per_class, **settings)
    tuner = DistillationTuner(dataset, net, chosen, validation)
    tuner.run()
    return tuner.result()


class DistillationTuner(Tuner):
    """``distill`` one outer step at a time.

    images: to begin with, [classes * k, C, H, W], one of each class in turn; None: noise with the data's mean and
    deviation. learn_images: False learns the rates alone.
    """

    title = "distill"

    def __init__(
        self,
        dataset: Any,
        net: NetOrFactory | None,
        settings: DistillationSettings,
        validation: Any = None,
        *,
        images: Tensor | None = None,
        learn_images: bool = True,
    ):
        super().__init__(settings.iterations)
        self.settings, self.learn_images = settings, learn_images
        data = read_once(dataset, "dataset", _images, settings.seed)
        self.classes = _all_classes(data)
        if net is None:
            net = _default_net(data, self.classes, settings.seed)
        self.starting = InitialNets(net, settings.seed, fixed='init="fixed"')
        self.net = self.starting.net
        like = next((p for p in self.net.parameters() if p.requires_grad), data.x)
        self.data = Labelled(data.x.to(like), data.y.to(like.device))
        self.validation = None
        if validation is not None:
            held_out = read_once(validation, "validation", _images, settings.seed)
            self.validation = Labelled(held_out.x.to(like), held_out.y.to(like.device))
        self.labels = torch.arange(self.classes).repeat(settings.images_per_class).to(like.device)
        self.training = ImageTraining(self.net, self.labels, self._batches())
        self.training.check(self.data.x[:2], self.classes)
        if settings.init == "random":
            self.starting.checked(settings.seed)  # It says now whether it can.
        images = self._noise() if images is None else images.to(like).clone()
        log_rates = torch.full((len(self.training.batches),), math.log(settings.rate)).to(like)
        self.hparams: Params = {IMAGES: images, LOG_RATES: log_rates}
        groups = [{"params": [images], "lr": settings.lr}, {"params": [log_rates], "lr": settings.rate_lr}]
        self.optimizer = torch.optim.Adam(groups)

    def step(self) -> Row:
        found = self.hypergradient()
        annealed = 0.5 * (1 + math.cos(math.pi * self.iteration / self.iterations))
        rates = (self.settings.lr if self.learn_images else 0.0, self.settings.rate_lr)
        for group, rate, name in zip(self.optimizer.param_groups, rates, (IMAGES, LOG_RATES)):
            group["lr"] = rate * annealed
            # Rates grow until the training is on the edge of chaos, where single gradients are huge.
            self.hparams[name].grad = found.grads[name]
            nn.utils.clip_grad_norm_(self.hparams[name], self.settings.clip)
        self.optimizer.step()
        row = {"val_loss": float(found.value), "rate": float(self.hparams[LOG_RATES].exp().mean())}
        if self.validation:
            with torch.no_grad():
                right = self.training.logits(found.final_params, self.validation.x).argmax(-1) == self.validation.y
            row["val_accuracy"] = float(right.double().mean())
        return row

    def hypergradient(self) -> Hypergradient:
        """Of outer step number ``self.iteration``: the loss on its batch of real images, in images and rates."""
        with seeded(self.settings.seed, self.iteration):
            which = torch.randperm(len(self.data.x))[: self.settings.batch].to(self.labels.device)
        real, training = self.data.select(which), self.training

        def outer_loss(params: Params, hparams: Params) -> Tensor:
            return training.losses(params, *real).mean()

        start = training.start(self.starts(self.iteration, self.settings.inits))
        return Unroll()(training.problem, training.rule, outer_loss, start, self.hparams, training.batches)

    def starts(self, draw: int, count: int) -> list[nn.Module]:
        """The net itself, or for random initialisations ``count`` nets drawn from (seed, draw)."""
        if self.settings.init == "fixed":
            return [self.net]
        return [self.starting.draw(self.settings.seed, draw, i) for i in range(count)]

    def result(self) -> Distilled:
        found = {name: h.detach().clone() for name, h in self.hparams.items()}
        return Distilled(
            found[IMAGES],
            self.labels,
            found[LOG_RATES].exp(),
            tuple(self.training.batches),
            copied(self.net),
            self.settings.init == "fixed",
            tuple(self.history),
        )

    def compare(self, x: Tensor, y: Tensor) -> dict[str, Row]:
        """Test loss and accuracy of nets trained on "distilled images", on "random real images" of the same number with
        rates learnt for them, and on the "whole training set".

        Means over the control's draws and, for random initialisations, over fresh ones; "accuracy_std" is the deviation
        over them where there are several, and "runs" their number.
        """
        return compared(self, x, y)

    def run(self, until: int | None = None, each: Callable[[Row], None] | None = None) -> Distilled:
        super().run(until, each)
        return self.result()

    def state_dict(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "history": [dict(row) for row in self.history],
            "hparams": {name: h.detach().clone() for name, h in self.hparams.items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, h in self.hparams.items():
            found = state["hparams"].get(name)
            if not isinstance(found, Tensor) or found.shape != h.shape:
                shape = list(found.shape) if isinstance(found, Tensor) else found
                raise CheckpointError(f"state of the distillation: {name} is {shape}, expected {list(h.shape)}")
            h.copy_(found)
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.iteration, self.history = state["iteration"], [dict(row) for row in state["history"]]

    def _batches(self) -> list[Tensor]:
        """For each inner step the positions of its images, which lie class after class and then again."""
        every, steps = torch.arange(len(self.labels), device=self.labels.device), self.settings.steps
        epoch = list(every.chunk(steps)) if self.settings.share else [every] * steps
        return epoch * self.settings.epochs

    def _noise(self) -> Tensor:
        x = self.data.x
        with seeded(self.settings.seed, -2):
            noise = torch.randn(len(self.labels), *x.shape[1:])
        return x.mean() + x.std() * noise.to(x)


def _images(data: Any, what: str) -> Labelled:
    found = labelled(data, what)
    if found.x.dim() != 4:
        raise DataError(f"{what}: found examples {list(found.x.shape[1:])}, expected images [channels, height, width]")
    if found.y.is_floating_point():
        raise DataError(f"{what}: found targets of {found.y.dtype}, expected labels (whole numbers from 0 on)")
    return found


def _all_classes(data: Labelled) -> int:
    """The number of classes. Raises DataError where one of them has no images."""
    count = torch.bincount(data.y)
    missing = (count == 0).nonzero().flatten().tolist()
    if missing:
        raise DataError(
            f"dataset: class {missing[0]} has no images; expected some of every class from 0 to {len(count) - 1}, the "
            "largest label"
        )
    return len(count)


def _default_net(data: Labelled, classes: int, seed: int) -> nn.Module:
    with seeded(seed, -3):
        return MLP(data.x.shape[1:], classes, (64,)).to(data.x)
