"""Every run as one validated tree of settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator

from metahpo.training.settings import InnerGradientName, RematName, Settings, TrainingSettings

# Where a name may be the user's own code, MODULE:ATTRIBUTE, found from the working directory.
CustomName = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]


def _named(value: Any) -> Any:
    if value == "":
        raise ValueError("should be a path or null")
    return value


# Where a run is kept.
RunDir = Annotated[Path | None, BeforeValidator(_named), Field(description="null: runs/CONFIG/DATE-TIME")]


class EpisodeSettings(Settings):
    """N-way K-shot tasks."""

    ways: int = Field(default=5, ge=2)
    shots: int = Field(default=1, ge=1)
    queries: int = Field(default=15, ge=1, description="query images a class in training")
    eval_queries: int | None = Field(
        default=None, ge=1, description="the same in validation and test; null: as in training"
    )


class GlyphsSettings(EpisodeSettings):
    """The bundled glyphs: 1,559 characters of 33 scripts, rendered from fonts, 28x28."""

    source: Literal["glyphs"]


class OmniglotSettings(EpisodeSettings):
    """Omniglot, 28x28, from its two zips or their folders."""

    source: Literal["omniglot"]
    root: Path = Path("data/omniglot")
    download: bool = Field(default=False, description="fetch it by torchvision if it is not there")
    split: Literal["shuffled", "alphabet"] = "shuffled"
    rotate: bool = Field(
        default=True, description="in training turn each class of a task by a random multiple of 90 degrees"
    )


class FolderSettings(EpisodeSettings):
    """Images in ROOT/{train,val,test}/CLASS/."""

    source: Literal["folder"]
    root: Path
    size: int = Field(default=84, ge=1, description="height and width in pixels")
    channels: Literal[1, 3] = 3
    rotate: bool = False


class SinusoidSettings(Settings):
    """Sine waves (Finn et al. 2017)."""

    source: Literal["sinusoid"]
    shots: int = Field(default=10, ge=1)
    queries: int = Field(default=10, ge=1)
    eval_queries: int | None = Field(default=100, ge=1)


class CustomTasks(Settings):
    """Your own tasks: MODULE:FUNCTION, called with split="train"|"val"|"test", seed and args, gives a TaskSource."""

    source: CustomName
    args: dict[str, Any] = Field(default_factory=dict)


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


class MAMLSettings(Settings):
    name: Literal["maml"]
    steps: int = Field(default=5, ge=1)
    inner_lr: float = Field(default=0.1, gt=0)
    learn_lr: bool = Field(default=False, description="learn that one rate")
    first_order: bool = False
    adapt_norms: bool = Field(default=False, description="adapt batch-norm scales and shifts in the inner loop too")
    inner_gradient: InnerGradientName = "reverse"
    remat: RematName = "none"


class MAMLPlusPlusSettings(Settings):
    name: Literal["maml_pp"]
    steps: int = Field(default=5, ge=1)
    inner_lr: float = Field(default=0.1, gt=0, description="initial rate")
    multi_step_epochs: int = Field(default=10, ge=0, description="annealing of the multi-step loss; 0: off")
    first_order_epochs: int = Field(default=0, ge=0, description="first-order epochs before second-order ones; 0: off")
    per_step_statistics: bool = True
    per_step_affine: bool = True
    layer_step_rates: bool = True
    inner_gradient: InnerGradientName = "reverse"
    remat: RematName = "none"


class CustomLearner(Settings):
    """Your own learner: MODULE:CLASS, called with the net, loss=... if it takes it, and args."""

    name: CustomName
    args: dict[str, Any] = Field(default_factory=dict)


def tag(key: str) -> Discriminator:
    """Chooses a section's model by the name under ``key``; a name with a colon is the user's own."""

    def chosen(value: Any) -> str | None:
        name = value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)
        return "custom" if isinstance(name, str) and ":" in name else name

    return Discriminator(chosen)


NAME_KEY = {"data": "source", "net": "name", "learner": "name", "objective": "name"}
UNIONS: dict[str, dict[str, type[Settings]]] = {
    "data": {
        "glyphs": GlyphsSettings,
        "omniglot": OmniglotSettings,
        "folder": FolderSettings,
        "sinusoid": SinusoidSettings,
        "custom": CustomTasks,
    },
    "net": {"conv4": Conv4Settings, "resnet12": ResNet12Settings, "mlp": MLPSettings, "custom": CustomNet},
    "learner": {"maml": MAMLSettings, "maml_pp": MAMLPlusPlusSettings, "custom": CustomLearner},
}

Data = Annotated[
    Annotated[GlyphsSettings, Tag("glyphs")]
    | Annotated[OmniglotSettings, Tag("omniglot")]
    | Annotated[FolderSettings, Tag("folder")]
    | Annotated[SinusoidSettings, Tag("sinusoid")]
    | Annotated[CustomTasks, Tag("custom")],
    tag("source"),
]
Net = Annotated[
    Annotated[Conv4Settings, Tag("conv4")]
    | Annotated[ResNet12Settings, Tag("resnet12")]
    | Annotated[MLPSettings, Tag("mlp")]
    | Annotated[CustomNet, Tag("custom")],
    tag("name"),
]
Learner = Annotated[
    Annotated[MAMLSettings, Tag("maml")]
    | Annotated[MAMLPlusPlusSettings, Tag("maml_pp")]
    | Annotated[CustomLearner, Tag("custom")],
    tag("name"),
]


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
