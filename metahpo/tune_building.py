"""From a config of ``metahpo tune`` to the objects of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from metahpo.building_net import check_outputs, make_net
from metahpo.custom import call
from metahpo.errors import ConfigError, DataError
from metahpo.training.environment import seeded
from metahpo.training.settings import device_of
from metahpo.tune_config import CustomData, DigitsSettings, TuneConfig
from metahpo.tuning.base import Tuner
from metahpo.tuning.cleaning import CleaningTuner
from metahpo.tuning.data import Labelled, Loader, labelled, load_digits, load_torchvision, with_wrong_labels
from metahpo.tuning.decay import DecayTuner
from metahpo.tuning.distillation import DistillationTuner
from metahpo.tuning.initial import InitialNets
from metahpo.tuning.rates import RatesTuner

Data = dict[str, Labelled]
NetFactory = Callable[[], nn.Module]


def build_data(config: TuneConfig) -> Data:
    """ "train", "val" and "test" on the config's device; with wrong labels "clean", the training data's right ones too.

    Raises ConfigError or DataError for what cannot serve.
    """
    data, seed = config.data, config.tune.seed  # type: ignore[attr-defined]
    if isinstance(data, CustomData):
        found = call(data.source, "data.source", data.args)
        if not isinstance(found, dict) or not {"train", "val", "test"} <= set(found):
            names = sorted(map(str, found)) if isinstance(found, dict) else type(found).__name__
            raise ConfigError(f"data.source: {data.source} gave {names}, expected a dict of train, val and test")
        parts = {
            name: labelled(found[name], f"data.source {data.source}, {name!r}") for name in ("train", "val", "test")
        }
        _check_same(parts, data.source)
    else:
        sizes = (data.train, data.val, data.test)
        if isinstance(data, DigitsSettings):
            parts = load_digits(sizes, seed)
        else:
            parts = load_torchvision(data.source, data.root, sizes, seed, data.download)
        if data.wrong_labels:
            parts["clean"] = parts["train"]
            parts["train"] = with_wrong_labels(parts["train"], data.wrong_labels, seed)
    return {name: part.to(device_of(config.device)) for name, part in parts.items()}


def _check_same(parts: Data, source: str) -> None:
    for name, part in parts.items():
        for what, found, expected in (("inputs", part.x, parts["train"].x), ("targets", part.y, parts["train"].y)):
            if found.shape[1:] != expected.shape[1:] or found.dtype != expected.dtype:
                raise DataError(
                    f"data.source {source}, {name!r}: {what} are {found.dtype} {list(found.shape[1:])}, train's are "
                    f"{expected.dtype} {list(expected.shape[1:])}"
                )


def net_factory(config: TuneConfig, data: Data) -> NetFactory:
    """A function that builds the config's net for the data; a net that cannot take them is refused now."""
    train = data["train"]
    shape = tuple(train.x.shape[1:])
    outputs = train.y.shape[-1] if train.y.is_floating_point() else max(part.classes for part in data.values())

    def build() -> nn.Module:
        return make_net(config.net, shape, outputs).to(train.x.device)

    with seeded(config.tune.seed):  # type: ignore[attr-defined]
        net = make_net(config.net, shape, outputs)
    what = "values" if train.y.is_floating_point() else "classes"
    check_outputs(net, train.x[:2].cpu(), outputs, config.net.name, what)
    return build


def loss_of(data: Data) -> Callable[[Tensor, Tensor], Tensor]:
    return F.mse_loss if data["train"].y.is_floating_point() else F.cross_entropy


def build_tuner(kind: str, config: Any) -> tuple[Tuner, Data]:
    """The tuner of a run as it begins, and its data."""
    data = build_data(config)
    return MAKERS[kind](net_factory(config, data), data, config.tune), data


def _rates(net: NetFactory, data: Data, settings: Any) -> Tuner:
    train, val = Loader(data["train"], settings.batch), Loader(data["val"], len(data["val"].x))
    return RatesTuner(net, loss_of(data), train, val, settings)


def _decay(net: NetFactory, data: Data, settings: Any) -> Tuner:
    return DecayTuner(InitialNets(net, settings.seed).net, loss_of(data), data["train"], data["val"], settings)


def _clean(net: NetFactory, data: Data, settings: Any) -> Tuner:
    return CleaningTuner(data["train"], data["val"], net, settings)


def _distill(net: NetFactory, data: Data, settings: Any) -> Tuner:
    return DistillationTuner(data["train"], net, settings, data["val"])


MAKERS: dict[str, Callable[[NetFactory, Data, Any], Tuner]] = {
    "rates": _rates,
    "decay": _decay,
    "clean": _clean,
    "distill": _distill,
}
