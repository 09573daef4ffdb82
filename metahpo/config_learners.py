"""The settings of a run's section ``learner``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from metahpo.config_union import CustomName
from metahpo.training.settings import InnerGradientName, RematName, Settings


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


class PolicyMAMLSettings(Settings):
    name: Literal["policy_maml"]
    steps: int = Field(default=1, ge=1, description="inner steps, which share a task's episodes evenly")
    inner_lr: float = Field(default=0.1, gt=0)
    learn_lr: bool = Field(default=False, description="learn that one rate")
    layer_step_rates: bool = Field(default=False, description="learn a rate for each tensor and step instead")
    first_order: bool = False
    discount: float = Field(default=0.99, ge=0, le=1)
    gae: float = Field(default=1.0, ge=0, le=1, description="lambda of generalised advantage estimation")
    initial_std: float = Field(default=1.0, gt=0, description="of actions, whose bounds are -1 and 1")


class CustomLearner(Settings):
    """Your own learner: MODULE:CLASS, called with the net, loss=... if it takes it, and args."""

    name: CustomName
    args: dict[str, Any] = Field(default_factory=dict)


LEARNERS: dict[str, type[Settings]] = {
    "maml": MAMLSettings,
    "maml_pp": MAMLPlusPlusSettings,
    "policy_maml": PolicyMAMLSettings,
    "custom": CustomLearner,
}
