"""The settings of a run's section ``data``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from metahpo.config_episodes import EpisodeSettings
from metahpo.config_union import CustomName
from metahpo.training.settings import Settings

Fraction = Annotated[float, Field(gt=0, lt=1)]


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
    """Images in ROOT/{train,val,test}/CLASS/, or in ROOT/images/ with ROOT/{train,val,test}.csv (filename,label)."""

    source: Literal["folder"]
    root: Path
    size: int = Field(default=84, ge=1, description="height and width in pixels")
    channels: Literal[1, 3] = 3
    rotate: bool = False


class CIFAR100Settings(EpisodeSettings):
    """CIFAR-FS (Bertinetto et al. 2019) or FC100 (Oreshkin et al. 2018), 32x32, from CIFAR-100."""

    source: Literal["cifar_fs", "fc100"]
    root: Path = Field(default=Path("data/cifar100"), description="where the folder cifar-100-python is")
    download: bool = Field(default=False, description="fetch it by torchvision if it is not there")


class DatasetSettings(EpisodeSettings):
    """Any data set of labelled images: of torchvision by its name, or your own MODULE:FUNCTION."""

    source: Literal["dataset"]
    dataset: str = Field(description="a class of torchvision.datasets, or MODULE:FUNCTION, which gives a Dataset")
    args: dict[str, Any] = Field(default_factory=dict, description="what it is called with (root, download, ...)")
    size: int | None = Field(default=None, ge=1, description="height and width in pixels; null: as they are, all alike")
    channels: Literal[1, 3, None] = Field(default=None, description="null: as they are")
    fractions: tuple[Fraction, Fraction, Fraction] = Field(
        default=(0.64, 0.16, 0.2), description="of the classes in train, val and test"
    )
    class_seed: int = Field(default=0, ge=0, description="mixes the classes before that")

    @property
    def download(self) -> bool:
        return bool(self.args.get("download"))

    @field_validator("fractions")
    @classmethod
    def _whole(cls, parts: tuple[float, ...]) -> tuple[float, ...]:
        if not math.isclose(sum(parts), 1, abs_tol=1e-6):
            raise ValueError("should have the sum 1")
        return parts


class DigitsPixelsSettings(Settings):
    """Image completion on scikit-learn's 1,797 handwritten digits, 8x8: an image a task, intensity from place."""

    source: Literal["digits_pixels"]
    shots: int = Field(default=16, ge=1, le=63, description="pixels of the support set")
    queries: int | None = Field(default=None, ge=1, description="pixels of the query set; null: all the others")
    eval_queries: int | None = Field(default=None, ge=1, description="the same in validation and test")


class SinusoidSettings(Settings):
    """Sine waves (Finn et al. 2017)."""

    source: Literal["sinusoid"]
    shots: int = Field(default=10, ge=1)
    queries: int = Field(default=10, ge=1)
    eval_queries: int | None = Field(default=100, ge=1)


class RolloutSettings(Settings):
    """Episodes of an environment, for ``learner: policy_maml``."""

    episodes: int = Field(default=20, ge=2, description="of a task to adapt to, and as many to be judged by")
    horizon: int = Field(default=100, ge=2, description="most steps of an episode")


class NavigationSettings(RolloutSettings):
    """A point that walks to a goal (Finn et al. 2017)."""

    source: Literal["navigation"]


class GymSettings(RolloutSettings):
    """Environments of gymnasium."""

    source: Literal["gym"]
    environment: str = Field(description="half_cheetah_velocity, half_cheetah_direction, or gymnasium's name with vary")
    vary: dict[str, tuple[float, float]] = Field(
        default_factory=dict, description="numbers of the environment that a task draws: {ATTRIBUTE: [LOW, HIGH]}"
    )

    @field_validator("vary")
    @classmethod
    def _ranges(cls, vary: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        for name, (low, high) in vary.items():
            if not -math.inf < low < high < math.inf:
                raise ValueError(f"{name} should be a range [LOW, HIGH], found {[low, high]}")
        return vary


class CustomTasks(Settings):
    """Your own tasks: MODULE:FUNCTION, called with split="train"|"val"|"test", seed and args, gives a TaskSource."""

    source: CustomName
    args: dict[str, Any] = Field(default_factory=dict)


DATA: dict[str, type[Settings]] = {
    "glyphs": GlyphsSettings,
    "omniglot": OmniglotSettings,
    "folder": FolderSettings,
    "cifar_fs": CIFAR100Settings,
    "fc100": CIFAR100Settings,
    "dataset": DatasetSettings,
    "digits_pixels": DigitsPixelsSettings,
    "sinusoid": SinusoidSettings,
    "navigation": NavigationSettings,
    "gym": GymSettings,
    "custom": CustomTasks,
}
