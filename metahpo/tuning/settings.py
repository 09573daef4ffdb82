"""The settings of weight decay by gradient and of hyper-cleaning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from metahpo.training.settings import Settings


class DecaySettings(Settings):
    """``tune_decay``: a training of ``steps`` steps, with an update of the decays after every ``every`` of them."""

    by: Literal["all", "layer", "parameter"] = Field(
        default="layer", description="one decay for the net, one a parameter tensor, or one a scalar weight"
    )
    steps: int = Field(default=600, ge=1, description="training steps in all")
    every: int = Field(default=5, ge=1, description="training steps between two updates of the decays")
    batch: int = Field(default=50, ge=1, description="training examples a step")
    val_batch: int = Field(default=500, ge=1, description="validation examples an update of the decays")
    optimizer: Literal["adam", "sgd"] = Field(default="adam", description="of the training")
    lr: float = Field(default=1e-3, gt=0, description="of the training")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of sgd")
    decay: float = Field(default=1e-4, gt=0, description="what every decay begins at")
    max_decay: float = Field(default=1.0, gt=0, description="no decay rises above it")
    decay_lr: float = Field(default=0.3, gt=0, description="rate of Adam on the decays' logarithms")
    terms: int = Field(default=3, ge=1, description="of the Neumann series for the inverse Hessian")
    scale: float = Field(default=0.1, gt=0, description="of that series: below 2 over the largest curvature")
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _begins_below(self) -> DecaySettings:
        if self.decay > self.max_decay:
            raise ValueError(f"decay: found {self.decay}, expected at most the {self.max_decay} of max_decay")
        return self


class CleaningSettings(Settings):
    """``clean``: ``iterations`` short trainings of ``steps`` steps, each with an update of the examples' weights."""

    iterations: int = Field(default=50, ge=1, description="updates of the weights")
    steps: int = Field(default=20, ge=1, description="training steps that each update differentiates through")
    batch: int | None = Field(default=None, ge=1, description="training examples a step; null: all of them")
    lr: float = Field(default=1.0, gt=0, description="of the training")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of the training")
    weight_lr: float = Field(default=0.1, gt=0, description="rate of Adam on the weights' logits")
    fresh: bool = Field(default=True, description="new initial weights of the net at each update; false: its own")
    threshold: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="an example whose label is right with less probability is suspected",
    )
    seed: int = Field(default=0, ge=0)
