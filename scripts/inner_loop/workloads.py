"""What is timed: the same weights and tasks for our learners and, without any code of metahpo, for the peers."""

from __future__ import annotations

import copy
import itertools
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
    """net: makes one; images or sequences of ``shape`` are class prototypes plus noise; ways 0: sine waves.
    skip: numbers of tasks that lie too near a kink for a comparison in float32."""

    net: Callable[[], nn.Module]
    shape: tuple[int, ...]
    ways: int
    shots: int
    queries: int
    tasks: int
    lr: float
    steps: int = 5
    plus_plus: bool = False
    skip: tuple[int, ...] = ()


# Float32 rounding that moves an activation across a kink of ReLU or max pooling changes the gradient by up to 1e-3, in
# every program alike; among millions of activations some always lie so near. Low inner rates, at which the steps see
# nearly the same activations, and few distinct filters (``repeat_filters``) leave so few chances that 1e-5 tells right
# from wrong; a task that still meets one is skipped. At rate 0.1 with 64 distinct filters all programs are 1e-4 from
# the float64 gradient on omniglot.
DISTINCT = 4
SPECS = {
    "omniglot": Spec(lambda: Conv4((1, 28, 28), 5), (1, 28, 28), 5, 1, 15, 8, 0.01, skip=(0, 14)),
    "maml_pp": Spec(lambda: Conv4((1, 28, 28), 20), (1, 28, 28), 20, 1, 1, 8, 0.01, plus_plus=True),
    "mini_imagenet": Spec(lambda: Conv4((3, 84, 84), 5, filters=48), (3, 84, 84), 5, 5, 15, 4, 0.001, skip=(3, 5)),
    # At the size of CIFAR-FS and with few tasks: 84x84 images take minutes a step on a CPU.
    "resnet12": Spec(lambda: ResNet12((3, 32, 32), 5), (3, 32, 32), 5, 1, 5, 2, 0.001, skip=(0,)),
    "mlp": Spec(lambda: MLP((1,), 1), (1,), 0, 10, 10, 25, 0.01),
    "transformer": Spec(lambda: Transformer((16, 16), 5), (16, 16), 5, 5, 15, 8, 0.01),
}
QUICK = {
    "omniglot": replace(SPECS["omniglot"], net=lambda: Conv4((1, 28, 28), 5, filters=4), queries=1, tasks=2, steps=2),
    "maml_pp": replace(SPECS["maml_pp"], net=lambda: Conv4((1, 28, 28), 5, filters=4), ways=5, tasks=2, steps=2),
    "mini_imagenet": replace(
        SPECS["mini_imagenet"],
        net=lambda: Conv4((3, 21, 21), 5, filters=4),
        shape=(3, 21, 21),
        shots=1,
        queries=1,
        tasks=2,
        steps=1,
    ),
    "resnet12": replace(
        SPECS["resnet12"],
        net=lambda: ResNet12((3, 16, 16), 5, widths=(4, 4, 4, 8)),
        shape=(3, 16, 16),
        queries=1,
        steps=1,
    ),
    "mlp": replace(SPECS["mlp"], tasks=4, steps=2),
    "transformer": replace(SPECS["transformer"], shots=1, queries=1, tasks=2, steps=1),
}


def build(name: str, *, quick: bool = False, tasks: int | None = None, device: str = "cpu") -> Workload:
    """The workload of this name in float32; the same numbers at every call."""
    spec = (QUICK if quick else SPECS)[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, batch = spec.net(), make_tasks(spec, tasks or spec.tasks)
        repeat_filters(net)
        loss = F.cross_entropy if spec.ways else F.mse_loss
        kind = MAMLPlusPlus if spec.plus_plus else MAML
        learner = kind(net, steps=spec.steps, inner_lr=spec.lr, loss=loss)
        perturb(learner)
    learner, batch = learner.to(device), batch.to(device)
    phase = learner.training_phase(0)
    return Workload(name, learner, phase, batch, make_problem(net.to(device), learner, phase, spec, loss))


def make_tasks(spec: Spec, count: int) -> Task:
    """The first ``count`` tasks that are not skipped, [T, N, ...]."""
    numbers = list(itertools.islice((n for n in itertools.count() if n not in spec.skip), count))
    if not spec.ways:
        return Sinusoid(shots=spec.shots, queries=spec.queries).batch(numbers)
    return Task(*(torch.stack(tensors) for tensors in zip(*(make_task(spec, number) for number in numbers))))


def make_task(spec: Spec, number: int) -> Task:
    """Task ``number``, the same whatever others there are."""
    generator = torch.Generator().manual_seed(number)
    prototypes = torch.randn(spec.ways, *spec.shape, generator=generator)

    def draw(examples: int) -> tuple[Tensor, Tensor]:
        x = prototypes.repeat_interleave(examples, 0)
        y = torch.arange(spec.ways).repeat_interleave(examples)
        return x + 0.5 * torch.randn(x.shape, generator=generator), y

    return Task(*draw(spec.shots), *draw(spec.queries))


@torch.no_grad()
def repeat_filters(net: nn.Module) -> None:
    """Makes channel c of every convolution equal channel c % DISTINCT, from which no gradient step parts it."""
    channels = 0
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            channels = module.out_channels
            weight = module.weight[torch.arange(channels) % DISTINCT]
            module.weight.copy_(weight[:, torch.arange(weight.shape[1]) % DISTINCT])
        elif isinstance(module, nn.Linear) and channels:
            weight = module.weight.unflatten(1, (channels, -1))[:, torch.arange(channels) % DISTINCT]
            # Equal features add up; the logits keep their size.
            module.weight.copy_(weight.flatten(1) * (DISTINCT / channels) ** 0.5)


@torch.no_grad()
def perturb(learner: MAML) -> None:
    """Makes what starts out equal differ, so that rows of another step or layer would show in the gradient."""
    for name, param in learner.outer_params().items():
        if name == "rule.rates":
            param.mul_(1 + 0.1 * torch.randn_like(param))
        elif name.removeprefix("module.net.") in learner.module.norm_names():
            noise = torch.randn(param.shape[0], DISTINCT)
            param.add_(noise[:, torch.arange(param.shape[1]) % DISTINCT], alpha=0.1)


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
