"""A net on the C kernels of ``metahpo.native``: convolutions, batch norm with the activation and pooling after it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from metahpo import native
from metahpo.functional.batch_norm import PerStepBatchNorm


def fuse(net: nn.Module) -> nn.Module:
    """``net`` changed to run on the C kernels where they can stand in; parameters and buffers keep their names.

    A ``Conv2d`` with an odd square kernel, stride 1 and "same" zero padding is taken; so is, inside an
    ``nn.Sequential``, a ``PerStepBatchNorm`` with the ReLU or leaky ReLU and 2 x 2 max pooling that follow it. What
    does not fit, and any input that is not a CPU image batch in float32 or float64, runs as before.
    """
    if _plain_sequence(net):
        net = _Chain(net)
    for name, child in list(net.named_children()):
        fused = _Conv2d(child) if _fits(child) else fuse(child)
        if fused is not child:
            net._modules[name] = fused
    if isinstance(net, _Chain):
        net.plan()
    return net


def runs_native(x: Tensor) -> bool:
    """Whether the kernels can take ``x``: an image batch on the CPU, outside torch's function transforms and forward
    mode."""
    return (
        x.dim() == 4
        and x.device.type == "cpu"
        and not torch._C._functorch.maybe_current_level()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
        and native.library(x.dtype) is not None
    )


class _Conv2d(nn.Conv2d):
    """A ``Conv2d`` that shares another's parameters and runs on the C kernel."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size[0], padding="same", device="meta")  # type: ignore[arg-type]
        self.weight, self.bias = conv.weight, conv.bias
        self.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        if runs_native(x) and x.dtype == self.weight.dtype:
            return native.conv2d(x, self.weight, self.bias)
        return super().forward(x)


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
        and not _hooked(module)
    )


class _Link(NamedTuple):
    """Modules of a chain that run as one, if ``norm`` is given, or one by one."""

    modules: list[nn.Module]
    norm: PerStepBatchNorm | None = None
    slope: float = 1.0
    pool: int = 1


class _Chain(nn.Sequential):
    """The modules of an ``nn.Sequential`` under their names, batch norms fused with what follows them."""

    def __init__(self, sequence: nn.Sequential):
        super().__init__()
        for name, module in sequence.named_children():
            self.add_module(name, module)
        self.train(sequence.training)
        self.links: list[_Link] = []

    def plan(self) -> None:
        modules = list(self.children())
        while modules:
            norm = modules.pop(0)
            if not isinstance(norm, PerStepBatchNorm) or _hooked(norm):
                self.links.append(_Link([norm]))
                continue
            parts, slope, pool = [norm], 1.0, 1
            if modules and (found := _slope(modules[0])) is not None:
                slope = found
                parts.append(modules.pop(0))
            if modules and _halves(modules[0]):
                pool = 2
                parts.append(modules.pop(0))
            self.links.append(_Link(parts, norm, slope, pool))

    def forward(self, x: Tensor) -> Tensor:
        for modules, norm, slope, pool in self.links:
            if norm is not None and norm.fusible(x) and runs_native(x):
                x = norm.fused(x, slope, pool)
            else:
                for module in modules:
                    x = module(x)
        return x


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


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
