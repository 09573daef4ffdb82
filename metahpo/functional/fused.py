"""A net on the C kernels of ``metahpo.native``: convolutions, batch norm with the activation and pooling after it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metahpo import native
from metahpo.functional.batch_norm import PerStepBatchNorm
from metahpo.functional.kernels import in_forward_mode
from metahpo.functional.levels import under_torch_func
from metahpo.functional.surgery import followed


def fuse(net: nn.Module) -> None:
    """Changes ``net`` to run on the C kernels where they can stand in; it keeps its modules and all their attributes.

    A ``Conv2d`` with an odd square kernel, stride 1 and "same" zero padding is taken; so is, inside an
    ``nn.Sequential``, a ``PerStepBatchNorm`` with the ReLU or leaky ReLU and 2 x 2 max pooling that follow it. What
    does not fit, and any input that is not a CPU image batch in float32 or float64, runs as before.
    """
    # By their classes, as a forward method of a module's own would refer back to it: each copy of a net would stay in
    # memory until Python looks for cycles.
    for module in net.modules():
        if _fits(module):
            module.__class__ = _Conv2d
        elif _plain_sequence(module):
            module.__class__ = _chained(type(module))
            module.links = _links(list(module._modules.values()))  # type: ignore[arg-type]


def runs_native(x: Tensor, *params: Tensor | None) -> bool:
    """Whether the kernels can take ``x`` with ``params``: an image batch on the CPU, all of one type, outside torch's
    function transforms and forward mode."""
    return (
        x.dim() == 4
        and x.device.type == "cpu"
        and x.numel() > 0
        and all(p is None or p.dtype == x.dtype for p in params)
        and not under_torch_func()
        and not in_forward_mode(x, *params)
        and not torch.is_autocast_enabled("cpu")
        and native.library(x.dtype) is not None
    )


class _Conv2d(nn.Conv2d):
    """A ``Conv2d`` that runs on the C kernel."""

    def forward(self, input: Tensor) -> Tensor:
        if runs_native(input, self.weight, self.bias) and input.shape[1] == self.in_channels:
            return native.conv2d(input, self.weight, self.bias)
        return super().forward(input)


def _fits(module: nn.Module) -> bool:
    if type(module) is not nn.Conv2d:
        return False
    size = module.kernel_size[0]
    return (
        module.kernel_size == (size, size)
        and size % 2 == 1
        and module.stride == (1, 1)
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.padding in ("same", (size // 2, size // 2))
        and module.padding_mode == "zeros"
        and not _hooked(module, but=followed)
    )


class _Link(NamedTuple):
    """Modules of a chain that run as one, if ``norm`` is given, or one by one."""

    modules: list[nn.Module]
    norm: PerStepBatchNorm | None = None
    slope: float = 1.0
    pool: int = 1


class _Chain(nn.Sequential):
    """An ``nn.Sequential`` whose batch norms are fused with what follows them."""

    links: list[_Link] | None = None  # None: a slice of a chain, which torch makes.

    def forward(self, input: Any) -> Any:
        if self.links is None:
            return super().forward(input)
        x = input
        for modules, norm, slope, pool in self.links:
            if norm is not None and isinstance(x, Tensor) and _fusible(norm, x, pool):
                x = norm.fused(x, slope, pool)
            else:
                for module in modules:
                    x = module(x)
        return x


@functools.cache
def _chained(kind: type[nn.Sequential]) -> type[nn.Sequential]:
    return type(kind.__name__, (_Chain, kind), {})


def _links(modules: list[nn.Module]) -> list[_Link]:
    links = []
    while modules:
        norm = modules.pop(0)
        own = type(norm).forward is not PerStepBatchNorm.forward
        if not isinstance(norm, PerStepBatchNorm) or own or _hooked(norm):
            links.append(_Link([norm]))
            continue
        parts: list[nn.Module] = [norm]
        slope, pool = 1.0, 1
        if modules and (found := _slope(modules[0])) is not None:
            slope = found
            parts.append(modules.pop(0))
        if modules and _halves(modules[0]):
            pool = 2
            parts.append(modules.pop(0))
        links.append(_Link(parts, norm, slope, pool))
    return links


def _fusible(norm: PerStepBatchNorm, x: Tensor, pool: int) -> bool:
    return norm.fusible(x) and min(x.shape[2:]) >= pool and runs_native(x, norm.weight, norm.bias, norm.running_mean)


def _plain_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and not _hooked(module)


def _slope(module: nn.Module) -> float | None:
    if _hooked(module):
        return None
    if type(module) is nn.ReLU:
        return 0.0
    # With a negative slope the activation would not be monotone, and pooling could not be done first.
    return module.negative_slope if type(module) is nn.LeakyReLU and module.negative_slope >= 0 else None


def _halves(module: nn.Module) -> bool:
    return (
        type(module) is nn.MaxPool2d
        and module.kernel_size in (2, (2, 2))
        and module.stride in (2, (2, 2))
        and module.padding in (0, (0, 0))
        and module.dilation in (1, (1, 1))
        and not module.ceil_mode
        and not module.return_indices
        and not _hooked(module)
    )


def _hooked(module: nn.Module, but: Any = None) -> bool:
    """Whether more runs than the class's forward method: a hook other than ``but``, or a forward method of the module's
    own."""
    after = [hook for hook in module._forward_hooks.values() if hook is not but]
    hooks = (after, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)
