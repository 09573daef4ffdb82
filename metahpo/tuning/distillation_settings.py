"""The settings of a dataset distillation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from metahpo.training.settings import Settings


class DistillationSettings(Settings):
    """What is distilled, for which initial weights, and how the outer loop runs.

    The inner training makes ``steps`` times ``epochs`` steps, each with a learnt rate of its own.
    """

    images_per_class: int = Field(default=1, ge=1, description="synthetic images a class")
    init: Literal["fixed", "random"] = Field(
        default="fixed", description="fixed: for the net's own weights; random: for new ones in every outer step"
    )
    steps: int = Field(default=10, ge=1, description="inner steps an epoch")
    epochs: int = Field(default=1, ge=1, description="inner epochs")
    share: bool = Field(
        default=False,
        description="each step of an epoch sees its own share of the images of every class; false: all of them",
    )
    rate: float = Field(default=0.1, gt=0, description="inner rate to begin with")
    iterations: int = Field(default=400, ge=1, description="outer steps (Adam)")
    batch: int = Field(default=256, ge=1, description="real images an outer step")
    inits: int = Field(
        default=4, ge=1, description="new initialisations an outer step, under torch.func.vmap if more than one"
    )
    lr: float = Field(default=0.02, gt=0, description="outer rate of the images, annealed to 0 by a cosine")
    rate_lr: float = Field(
        default=0.02, gt=0, description="outer rate of the logarithms of the inner rates, annealed too"
    )
    clip: float = Field(
        default=0.1, gt=0, description="the greatest norm of an outer gradient, of images and of rates each"
    )
    full_steps: int = Field(default=1000, ge=1, description="Adam steps on all real images, to compare with")
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _equal_shares(self) -> DistillationSettings:
        if self.share and self.images_per_class % self.steps:
            raise ValueError(
                f"images_per_class: found {self.images_per_class}, expected a multiple of steps ({self.steps}) for "
                "share: true"
            )
        return self
