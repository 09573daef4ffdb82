"""Every run as one validated tree of settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, field_validator

from metahpo.config_data import DATA
from metahpo.config_learners import LEARNERS
from metahpo.config_union import CustomName, union
from metahpo.training.settings import Settings, TrainingSettings


def _named(value: Any) -> Any:
    if value == "":
        raise ValueError("should be a path or null")
    return value


# Where a run is kept.
RunDir = Annotated[Path | None, BeforeValidator(_named), Field(description="null: runs/CONFIG/DATE-TIME")]


class Conv4Settings(Settings):
    name: Literal["conv4"]
    filters: int = Field(default=64, ge=1)
    slope: float = Field(default=0.01, ge=0, description="of the leaky ReLU; 0: ReLU")


class ResNet12Settings(Settings):
    name: Literal["resnet12"]
    widths: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(64, 128, 256, 512), min_length=4, max_length=4, description="channels of each block"
    )
    slope: float = Field(default=0.1, ge=0, description="of the leaky ReLU; 0: ReLU")


class MLPSettings(Settings):
    name: Literal["mlp"]
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (40, 40)


class CustomNet(Settings):
    """Your own net: MODULE:FUNCTION, called with args, and with in_shape and out_features if it takes them."""

    name: CustomName
    args: dict[str, Any] = Field(default_factory=dict)


NAME_KEY = {"data": "source", "net": "name", "learner": "name", "objective": "name"}
NETS: dict[str, type[Settings]] = {
    "conv4": Conv4Settings,
    "resnet12": ResNet12Settings,
    "mlp": MLPSettings,
    "custom": CustomNet,
}
UNIONS = {"data": DATA, "net": NETS, "learner": LEARNERS}
Data, Net, Learner = union(DATA, "source"), union(NETS, "name"), union(LEARNERS, "name")


class RunConfig(Settings):
    """One run; ``data``, ``net``, ``learner`` are chosen by ``source`` or ``name``; a bare name takes the defaults."""

    data: Data
    net: Net
    learner: Learner
    training: TrainingSettings = TrainingSettings()
    run_dir: RunDir = None

    @field_validator("training", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        return {} if value is None else value


class Schema(NamedTuple):
    """The shape of one kind of config.

    model: the whole; unions: the sections whose model is chosen by a name (under ``NAME_KEY``), with their models;
    sections: the others.
    """

    model: type[Settings]
    unions: Mapping[str, Mapping[str, type[Settings]]]
    sections: Mapping[str, type[Settings]]


RUN = Schema(RunConfig, UNIONS, {"training": TrainingSettings})
