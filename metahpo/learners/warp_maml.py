"""Warp-MAML: layers that shape the inner loop's steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metahpo.checks import check_type
from metahpo.errors import NetArgumentError, NetError
from metahpo.functional.copies import unwrapped
from metahpo.functional.surgery import is_called, like, with_layers
from metahpo.learners.maml import MAML


class Warp(nn.Module):
    """A linear layer that begins as the identity: a 3x3 convolution of ``channels`` after a convolution, a matrix after
    a linear layer."""

    def __init__(self, channels: int, image: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3) if image else torch.eye(channels))
        if image:
            nn.init.dirac_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight, padding=1) if self.weight.dim() == 4 else x @ self.weight.mT


class WarpMAML(MAML):
    """Puts a warp layer after every layer but the head: the inner loop adapts the net through them and leaves them
    alone, so that they precondition its gradients; the outer loop learns them with the initial weights (Flennerhag et
    al. 2020, section 3.2 and equation 10, Warp-MAML).

    Arguments as in ``MAML``. The layers are linear and begin as the identity, where this is MAML. A layer whose weights
    the net reads without calling it, as attention does, has none at work.
    """

    def __init__(self, net: nn.Module, **options: Any):
        check_type(self, "net", net, nn.Module, "a module", error=NetArgumentError)
        kinds = (nn.Conv2d, nn.Linear)
        net = unwrapped(net)
        layers = [name for name, module in net.named_modules() if isinstance(module, kinds) and is_called(module)]
        if len(layers) < 2:
            raise NetError(f"{type(net).__name__} has no Conv2d or Linear before its head to put a warp layer after")
        super().__init__(with_layers(net, layers[:-1], _warp), **options)

    def adapted_names(self) -> list[str]:
        warps = {name for name, module in self.module.net.named_modules() if isinstance(module, Warp)}
        return [name for name in super().adapted_names() if name.rpartition(".")[0] not in warps]


def _warp(layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        return like(Warp(layer.out_channels, image=True), layer)
    assert isinstance(layer, nn.Linear)
    return like(Warp(layer.out_features, image=False), layer)
