"""The settings that all N-way K-shot tasks share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from metahpo.tasks.shots import Count, Imbalance, ends
from metahpo.training.settings import Settings


def _at_least(least: int) -> BeforeValidator:
    """A whole number of at least ``least``, or a range [low, high] of such numbers."""

    def checked(value: Any) -> Any:
        if type(value) is int:
            if value < least:
                raise ValueError(f"should be greater than or equal to {least}")
            return value
        if isinstance(value, (list, tuple)) and [type(v) for v in value] == [int, int]:
            low, high = value
            if least <= low <= high:
                return low, high
        raise ValueError(f"should be a whole number, or a range [low, high] from {least} on")

    return BeforeValidator(checked)


class ImbalanceSettings(Settings):
    """Support sets with unevenly many images of each class."""

    kind: Literal["linear", "step", "random"]
    min: int = Field(default=1, ge=1)
    max: int

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max <= self.min:
            raise ValueError(f"max should be greater than min, {self.min}, found {self.max}")
        return self


class EpisodeSettings(Settings):
    """N-way K-shot tasks."""

    ways: Annotated[Count, _at_least(2)] = Field(
        default=5, description="or a range [low, high], drawn for each batch of training"
    )
    shots: Annotated[Count, _at_least(1)] = Field(default=1, description="a number or a range too")
    queries: int = Field(default=15, ge=1, description="query images a class in training")
    eval_ways: int | None = Field(default=None, ge=2, description="in validation and test; null: the ways' highest")
    eval_shots: int | None = Field(default=None, ge=1, description="in validation and test; null: the shots' highest")
    eval_queries: int | None = Field(
        default=None, ge=1, description="the same in validation and test; null: as in training"
    )
    imbalance: ImbalanceSettings | None = Field(
        default=None,
        description="{kind: linear, step or random, min, max}: support images a class, shots on average; null: even",
    )

    def shape(self, split: str) -> tuple[Count, Count]:
        """Ways and shots of a split's tasks."""
        if split == "train":
            return self.ways, self.shots
        return self.eval_ways or ends(self.ways)[1], self.eval_shots or ends(self.shots)[1]

    @property
    def most_ways(self) -> int:
        """Of any task, in training and evaluation."""
        return max(ends(self.shape(split)[0])[1] for split in ("train", "test"))

    def uneven(self) -> Imbalance | None:
        return None if self.imbalance is None else Imbalance(**self.imbalance.model_dump())
