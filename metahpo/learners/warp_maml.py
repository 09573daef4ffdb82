"""Warp-MAML: layers that shape the inner loop's steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metahpo.checks import check_choice, check_type
from metahpo.errors import NetArgumentError, NetError
from metahpo.functional import Params
from metahpo.functional.copies import unwrapped
from metahpo.functional.surgery import is_called, like, with_layers
from metahpo.learners.base import Adapted
from metahpo.learners.head import events
from metahpo.learners.maml import MAML
from metahpo.learners.phase import Phase

LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.Bilinear,
)


class Warp(nn.Module):
    """A linear layer that begins as the identity: a convolution of ``channels`` with kernels of 3 in each of ``dims``
    dimensions, or where there are none a matrix for the last dimension."""

    def __init__(self, channels: int, dims: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, *[3] * dims) if dims else torch.eye(channels))
        if dims:
            nn.init.dirac_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}.get(self.weight.dim())
        return x @ self.weight.mT if convolve is None else convolve(x, self.weight, padding=1)


class WarpMAML(MAML):
    """Puts a warp layer after every linear and convolutional layer but the head: the inner loop adapts the net through
    them and leaves them alone, so that they precondition its gradients; the outer loop learns them with the initial
    weights (Flennerhag et al. 2020, section 3.2 and equation 10, Warp-MAML).

    Arguments as in ``MAML``. head: the name of the layer without a warp layer; by default the last that the net
    registers, which is refused on the first example where another one runs last. The warp layers are linear and begin
    as the identity, where this is MAML. A layer that is called several times has one, which follows it each time; where
    the net reads the weights of a layer without calling it, as attention does, none follows.
    """

    def __init__(self, net: nn.Module, *, head: str | None = None, **options: Any):
        check_type(self, "net", net, nn.Module, "a module", error=NetArgumentError)
        check_type(self, "head", head, (str, type(None)), "the name of a layer or None", error=NetArgumentError)
        net = unwrapped(net)
        layers = [name for name, module in net.named_modules() if isinstance(module, LAYERS) and is_called(module)]
        if len(layers) < 2:
            raise NetError(
                f"{type(net).__name__} has no linear or convolutional layer before its head to put a warp layer after"
            )
        if head is not None:
            check_choice(self, "head", head, layers, error=NetArgumentError)
        last, self._looked = head or layers[-1], head is not None
        super().__init__(with_layers(net, [name for name in layers if name != last], _warp), **options)

    def look_at(self, x: Tensor) -> None:
        if self._looked:
            return
        layers = {name: layer for name, layer in self.module.net.named_modules() if isinstance(layer, LAYERS)}
        called = [name for kind, name in events(self.module, x) if kind == "begin" and name in layers]
        if called and any(isinstance(part, Warp) for part in layers[called[-1]].children()):
            raise NetArgumentError(
                f"WarpMAML: head: {called[-1]!r} is the last layer that the net calls, but not the last that it "
                f"registers, so that a warp layer follows it; give head={called[-1]!r}"
            )
        self._looked = True

    def adapt(self, support_x: Tensor, support_y: Tensor, phase: Phase) -> Adapted:
        self.look_at(support_x)
        return super().adapt(support_x, support_y, phase)

    def current_state(self, state: Params) -> Params:
        """In the version before Conv2d and Linear layers alone had warp layers; the others are still the identity."""
        missing = {}
        for name, module in self.named_modules():
            layer = self.get_submodule(name.rpartition(".")[0])
            if isinstance(module, Warp) and not isinstance(layer, (nn.Conv2d, nn.Linear)):
                missing[f"{name}.weight"] = module.weight.detach()
        return {**missing, **super().current_state(state)}

    def adapted_names(self) -> list[str]:
        warps = {name for name, module in self.module.net.named_modules() if isinstance(module, Warp)}
        return [name for name in super().adapted_names() if name.rpartition(".")[0] not in warps]


def _warp(layer: nn.Module) -> nn.Module:
    dims = len(getattr(layer, "kernel_size", ()))
    return like(Warp(layer.out_channels if dims else layer.out_features, dims), layer)  # type: ignore[arg-type]
