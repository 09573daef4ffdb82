"""What is timed: the same weights and tasks for our learners and, without any code of metahpo, for the peers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from inner_loop.transformer import Transformer
from metahpo.learners import MAML, MAMLPlusPlus, MetaLearner, Phase
from metahpo.nets import MLP, Conv4, ResNet12
from metahpo.tasks import Sinusoid, Task


@dataclass(frozen=True)
class Problem:
    """One meta-step in plain terms, all that a peer is given.

    net: with batch norms that keep no running statistics, which no gradient depends on. fast: the parameters that the
    inner loop adapts. outer: what the outer loop learns, leaves by name: the net's own parameters or, where ``rows``,
    batch-norm scales and shifts as [steps, C] and "rates" as [len(fast), steps]. step_weights: of the query loss after
    each inner step.
    """

    net: nn.Module
    fast: tuple[str, ...]
    outer: dict[str, Tensor]
    lr: float
    step_weights: tuple[float, ...]
    loss: Callable[[Tensor, Tensor], Tensor]
    rows: bool

    def slow(self, outer: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The net's parameters at inner step ``step`` that are not adapted."""
        names = [name for name in outer if name not in self.fast and name != "rates"]
        return {name: outer[name][step] if self.rows else outer[name] for name in names}

    def rates(self, outer: dict[str, Tensor], step: int) -> list[Tensor] | list[float]:
        """The rate of each adapted parameter at inner step ``step``."""
        return list(outer["rates"][:, step].unbind()) if self.rows else [self.lr] * len(self.fast)


@dataclass(frozen=True)
class Workload:
    """A learner with a batch of tasks [T, N, ...], and the same as a ``Problem``."""

    name: str
    learner: MetaLearner
    phase: Phase
    tasks: Task
    problem: Problem

    def canonical(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """A peer's gradients by the learner's names and in its shapes."""
        params = self.learner.outer_params()
        named = {"rule.rates" if name == "rates" else f"module.net.{name}": grad for name, grad in grads.items()}
        if named.keys() != params.keys():
            raise ValueError(f"gradients of other parameters: {sorted(named.keys() ^ params.keys())}")
        return {name: named[name].reshape(p.shape) for name, p in params.items()}


@dataclass(frozen=True)
class Spec:
    """net: makes one; images or sequences of ``shape`` are class prototypes plus noise; ways 0: sine waves."""

    net: Callable[[], nn.Module]
    shape: tuple[int, ...]
    ways: int
    shots: int
    queries: int
    tasks: int
    lr: float
    steps: int = 5
    plus_plus: bool = False


# Inner rates low enough that no path to the outer loss crosses so many kinks of ReLU and max pooling that float32
# rounding alone moves the gradient by 1e-5; a float64 run of the same path tells the difference.
SPECS = {
    "omniglot": Spec(lambda: Conv4((1, 28, 28), 5), (1, 28, 28), 5, 1, 15, 8, 0.1),
    "maml_pp": Spec(lambda: Conv4((1, 28, 28), 20), (1, 28, 28), 20, 1, 1, 8, 0.1, plus_plus=True),
    "mini_imagenet": Spec(lambda: Conv4((3, 84, 84), 5, filters=48), (3, 84, 84), 5, 5, 15, 4, 0.01),
    # At the size of CIFAR-FS and with few tasks: 84x84 images take minutes a step on a CPU.
    "resnet12": Spec(lambda: ResNet12((3, 32, 32), 5), (3, 32, 32), 5, 1, 5, 2, 0.01),
    "mlp": Spec(lambda: MLP((1,), 1), (1,), 0, 10, 10, 25, 0.01),
    "transformer": Spec(lambda: Transformer((16, 16), 5), (16, 16), 5, 5, 15, 8, 0.01),
}
QUICK = {
    "omniglot": replace(SPECS["omniglot"], net=lambda: Conv4((1, 28, 28), 5, filters=8), queries=3, tasks=2, steps=2),
    "maml_pp": replace(SPECS["maml_pp"], net=lambda: Conv4((1, 28, 28), 20, filters=8), tasks=2, steps=2),
    "mini_imagenet": replace(
        SPECS["mini_imagenet"], net=lambda: Conv4((3, 42, 42), 5, filters=8), shape=(3, 42, 42), queries=2, tasks=2, steps=2
    ),
    "resnet12": replace(
        SPECS["resnet12"], net=lambda: ResNet12((3, 16, 16), 5, widths=(4, 8, 8, 16)), shape=(3, 16, 16), steps=2
    ),
    "mlp": replace(SPECS["mlp"], tasks=4),
    "transformer": replace(SPECS["transformer"], shots=1, queries=3, tasks=2, steps=2),
}


def build(name: str, *, quick: bool = False, tasks: int | None = None, device: str = "cpu") -> Workload:
    """The workload of this name in float32; the same numbers at every call."""
    spec = (QUICK if quick else SPECS)[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, batch = spec.net(), make_tasks(spec, tasks or spec.tasks)
        loss = F.cross_entropy if spec.ways else F.mse_loss
        kind = MAMLPlusPlus if spec.plus_plus else MAML
        learner = kind(net, steps=spec.steps, inner_lr=spec.lr, loss=loss)
        perturb(learner)
    learner, batch = learner.to(device), batch.to(device)
    phase = learner.training_phase(0)
    return Workload(name, learner, phase, batch, make_problem(net.to(device), learner, phase, spec, loss))


def make_tasks(spec: Spec, count: int) -> Task:
    """``count`` tasks [T, N, ...]."""
    if not spec.ways:
        return Sinusoid(shots=spec.shots, queries=spec.queries).batch(range(count))
    classes = torch.arange(spec.ways).repeat(count, 1)

    def draw(prototypes: Tensor, examples: int) -> tuple[Tensor, Tensor]:
        x = prototypes.repeat_interleave(examples, 1)
        return x + 0.5 * torch.randn_like(x), classes.repeat_interleave(examples, 1)

    prototypes = torch.randn(count, spec.ways, *spec.shape)
    return Task(*draw(prototypes, spec.shots), *draw(prototypes, spec.queries))


@torch.no_grad()
def perturb(learner: MAML) -> None:
    """Makes what starts out equal differ, so that rows of another step or layer would show in the gradient."""
    for name, param in learner.outer_params().items():
        if name == "rule.rates":
            param.mul_(1 + 0.1 * torch.randn_like(param))
        elif name.removeprefix("module.net.") in learner.module.norm_names():
            param.add_(torch.randn_like(param), alpha=0.1)


def make_problem(net: nn.Module, learner: MAML, phase: Phase, spec: Spec, loss) -> Problem:
    """The same meta-step without metahpo: ``net`` with the learner's values."""
    net = copy.deepcopy(net)
    norms = {name: module for name, module in net.named_modules() if isinstance(module, _BatchNorm)}
    for norm in norms.values():
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    outer = dict(net.named_parameters())
    fast = tuple(name for name in outer if name.rpartition(".")[0] not in norms)
    for name, param in learner.outer_params().items():
        own, value = name.removeprefix("module.net."), param.detach().clone()
        if own == "rule.rates":
            outer["rates"] = value.requires_grad_()
        elif spec.plus_plus and own not in fast:
            outer[own] = value.requires_grad_()
        else:
            outer[own].data.copy_(value.reshape(outer[own].shape))
    weights = [0.0] * (spec.steps - 1) + [1.0] if phase.step_weights is None else phase.step_weights.tolist()
    return Problem(net, fast, outer, spec.lr, tuple(weights), loss, spec.plus_plus)
