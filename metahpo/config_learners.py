"""The settings of a run's section ``learner``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from metahpo.config_union import CustomName
from metahpo.training.settings import InnerGradientName, RematName, Settings


class InnerLoopSettings(Settings):
    """What every learner with an inner loop has."""

    name: str
    steps: int = Field(default=5, ge=1)
    inner_lr: float = Field(default=0.1, gt=0, description="(initial) rate of the inner steps")


class GradientSettings(InnerLoopSettings):
    """A learner with a gradient through its inner loop, and the improvements of MAML++, here off."""

    first_order: bool = False
    adapt_norms: bool = Field(default=False, description="adapt batch-norm scales and shifts in the inner loop too")
    multi_step_epochs: int = Field(default=0, ge=0, description="annealing of the multi-step loss; 0: off")
    first_order_epochs: int = Field(default=0, ge=0, description="first-order epochs before second-order ones; 0: off")
    per_step_statistics: bool = Field(default=False, description="batch-norm running statistics by inner step")
    per_step_affine: bool = Field(default=False, description="batch-norm scales and shifts by inner step")
    inner_gradient: InnerGradientName = "reverse"
    remat: RematName = "none"


class RatesSettings(GradientSettings):
    """Such a learner whose steps are at one rate, or at learnt ones."""

    learn_lr: bool = Field(default=False, description="learn that one rate")
    layer_step_rates: bool = Field(default=False, description="learn a rate for each tensor and step")


HeadName = Annotated[str | None, Field(description="layer of the net that is its head; null: the one that runs last")]


class MAMLSettings(RatesSettings):
    name: Literal["maml"]


class MAMLPlusPlusSettings(InnerLoopSettings):
    name: Literal["maml_pp"]
    multi_step_epochs: int = Field(default=10, ge=0, description="annealing of the multi-step loss; 0: off")
    first_order_epochs: int = Field(default=0, ge=0, description="first-order epochs before second-order ones; 0: off")
    per_step_statistics: bool = True
    per_step_affine: bool = True
    layer_step_rates: bool = True
    inner_gradient: InnerGradientName = "reverse"
    remat: RematName = "none"


class ANILSettings(RatesSettings):
    """Adapts the head alone."""

    name: Literal["anil"]
    head: HeadName = None


class BOILSettings(RatesSettings):
    """Adapts all but the head."""

    name: Literal["boil"]
    head: HeadName = None


class MetaSGDSettings(GradientSettings):
    """Learns a rate for every weight."""

    name: Literal["meta_sgd"]
    layer_step_rates: bool = Field(default=False, description="learn the weights' rates for each step apart")


class MetaCurvatureSettings(GradientSettings):
    """Learns matrices that transform each layer's gradient."""

    name: Literal["meta_curvature"]


class WarpMAMLSettings(RatesSettings):
    """Learns layers that precondition the inner steps."""

    name: Literal["warp_maml"]
    head: HeadName = None


class CAVIASettings(RatesSettings):
    """Adapts a small context that scales and shifts the features of a layer."""

    name: Literal["cavia"]
    context: int = Field(default=100, ge=1, description="size of the context")
    after: str | None = Field(default=None, description="layer of the net whose output it changes; null: see CAVIA")


class IMAMLSettings(InnerLoopSettings):
    """MAML by the implicit function theorem."""

    name: Literal["imaml"]
    steps: int = Field(default=16, ge=1)
    strength: float = Field(
        default=2.0, gt=0, description="how strongly a task's weights are drawn to the initial ones"
    )
    cg_steps: int = Field(default=5, ge=0, description="products with the Hessian in the outer gradient")
    adapt_norms: bool = False


class ReptileSettings(InnerLoopSettings):
    """Moves the initial weights towards each task's."""

    name: Literal["reptile"]
    minibatches: int = Field(default=2, ge=1, description="parts of a task's data, one a step in turn")
    eval_steps: int = Field(default=20, ge=1, description="inner steps in evaluation")


class ProtoNetSettings(Settings):
    """Nearest mean embedding; a baseline."""

    name: Literal["proto_net"]
    head: HeadName = None


class LinearHeadSettings(InnerLoopSettings):
    """A linear head on the features of an ordinary classifier of all training classes; a baseline."""

    name: Literal["linear_head"]
    steps: int = Field(default=100, ge=1)
    inner_lr: float = Field(default=1.0, gt=0, description="rate, relative to the features' mean square length")
    head: HeadName = None


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
    "anil": ANILSettings,
    "boil": BOILSettings,
    "meta_sgd": MetaSGDSettings,
    "meta_curvature": MetaCurvatureSettings,
    "warp_maml": WarpMAMLSettings,
    "cavia": CAVIASettings,
    "imaml": IMAMLSettings,
    "reptile": ReptileSettings,
    "proto_net": ProtoNetSettings,
    "linear_head": LinearHeadSettings,
    "policy_maml": PolicyMAMLSettings,
    "custom": CustomLearner,
}
