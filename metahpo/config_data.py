"""The settings of a run's section ``data``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from metahpo.config_union import CustomName
from metahpo.training.settings import Settings


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
    "sinusoid": SinusoidSettings,
    "navigation": NavigationSettings,
    "gym": GymSettings,
    "custom": CustomTasks,
}
