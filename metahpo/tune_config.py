"""The configs of ``metahpo tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Tag, create_model

from metahpo.config import Conv4Settings, CustomNet, MLPSettings, ResNet12Settings, RunDir, Schema
from metahpo.config_union import CustomName, tag
from metahpo.training.settings import DeviceName, Settings
from metahpo.tuning.distillation_settings import DistillationSettings
from metahpo.tuning.rates import RatesSettings
from metahpo.tuning.settings import CleaningSettings, DecaySettings


class SplitSettings(Settings):
    """How many examples each part of the data gets."""

    train: int = Field(default=900, ge=1, description="examples to train on")
    val: int = Field(default=300, ge=1, description="examples to tune by")
    test: int = Field(
        default=597, ge=1, description="examples to report on, from the official test set if there is one"
    )
    wrong_labels: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="this share of the training labels is made wrong, to see what cleaning finds",
    )


class DigitsSettings(SplitSettings):
    """scikit-learn's 1,797 handwritten digits, 8x8; no download."""

    source: Literal["digits"]


class TorchvisionSettings(SplitSettings):
    """MNIST, Fashion-MNIST or CIFAR-10, read by torchvision."""

    source: Literal["mnist", "fashion_mnist", "cifar10"]
    root: Path = Field(default=Path("data"), description="where torchvision keeps them")
    download: bool = Field(default=False, description="fetch them if they are not there")
    train: int = Field(default=10_000, ge=1, description="examples to train on")
    val: int = Field(default=5_000, ge=1, description="examples to tune by")
    test: int = Field(default=10_000, ge=1, description="examples of the official test set to report on")


class CustomData(Settings):
    """Your own data: MODULE:FUNCTION, called with args, gives {"train": (x, y), "val": (x, y), "test": (x, y)}."""

    source: CustomName
    args: dict[str, Any] = Field(default_factory=dict)


class SmallResNetSettings(Settings):
    name: Literal["small_resnet"]
    width: int = Field(default=16, ge=1, description="channels of the first block")
    blocks: int = Field(default=3, ge=1)
    norm: Literal["batch", "group"] = "batch"


class ResidualMLPSettings(Settings):
    name: Literal["residual_mlp"]
    width: int = Field(default=32, ge=1)
    blocks: int = Field(default=3, ge=1, description="pairs of layers with a connection around them")


UNIONS: dict[str, dict[str, type[Settings]]] = {
    "data": {
        "digits": DigitsSettings,
        "mnist": TorchvisionSettings,
        "fashion_mnist": TorchvisionSettings,
        "cifar10": TorchvisionSettings,
        "custom": CustomData,
    },
    "net": {
        "mlp": MLPSettings,
        "residual_mlp": ResidualMLPSettings,
        "small_resnet": SmallResNetSettings,
        "conv4": Conv4Settings,
        "resnet12": ResNet12Settings,
        "custom": CustomNet,
    },
}


def _union(section: str, key: str) -> Any:
    kinds = UNIONS[section]
    choice: Any = None
    for name, model in kinds.items():
        tagged = Annotated[model, Tag(name)]  # type: ignore[valid-type]
        choice = tagged if choice is None else choice | tagged
    return Annotated[choice, tag(key)]


class TuneConfig(Settings):
    """One tuning; ``data`` and ``net`` are chosen by ``source`` or ``name``; a bare name takes the defaults."""

    data: _union("data", "source")  # type: ignore[valid-type]
    net: _union("net", "name")  # type: ignore[valid-type]
    device: DeviceName = "auto"
    run_dir: RunDir = None


# The settings of each kind, under its config's key "tune".
KINDS: dict[str, type[Settings]] = {
    "rates": RatesSettings,
    "decay": DecaySettings,
    "clean": CleaningSettings,
    "distill": DistillationSettings,
}


def _schema(kind: str) -> Schema:
    settings = KINDS[kind]
    model = create_model(f"{kind.title()}Config", __base__=TuneConfig, tune=(settings, settings()))
    return Schema(model, UNIONS, {"tune": settings})


SCHEMAS = {kind: _schema(kind) for kind in KINDS}
