"""ResNet12, the residual net of the few-shot papers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metahpo.checks import check_number
from metahpo.errors import NetArgumentError
from metahpo.nets.arguments import NamedSizes, check_shape, check_size


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions with batch normalisation, a normalised 1x1 convolution around them, leaky ReLU, 2x2 max
    pooling."""

    def __init__(self, in_channels: int, width: int, slope: float, pool: bool):
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(3):
            layers += [nn.Conv2d(width if index else in_channels, width, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.LeakyReLU(slope)]
        self.layers = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential(nn.Conv2d(in_channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.activation = nn.LeakyReLU(slope)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.activation(self.layers(x) + self.shortcut(x)))


class ResNet12(NamedSizes, nn.Module):
    """Four ``ResidualBlock``s, global average pooling and a linear layer (Oreshkin et al. 2018, "TADAM";
    Lee et al. 2019, "MetaOptNet", section 4.1), without the latter's DropBlock.

    in_shape: (C, H, W) of the images; out_features: outputs (the ways); widths: channels of each block, here TADAM's
    (MetaOptNet: 64, 160, 320, 640); slope: of the leaky ReLU. Images [N, C, H, W] in, logits [N, out_features] out.
    Convolutions have no bias and are initialised as He et al. 2015 do for this slope, keeping the variance of gradients
    (fan out). Blocks stop pooling where the image has shrunk to one pixel a side.
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        out_features: int,
        widths: Sequence[int] = (64, 128, 256, 512),
        slope: float = 0.1,
    ):
        super().__init__()
        channels, height, width = check_shape(self, "in_shape", in_shape, 3)
        out_features, widths = check_size(self, "out_features", out_features), check_shape(self, "widths", widths)
        slope = check_number(self, "slope", slope, at_least=0, error=NetArgumentError)
        blocks = []
        for filters in widths:
            pool = min(height, width) >= 2
            blocks.append(ResidualBlock(channels, filters, slope, pool))
            channels, height, width = filters, height // (2 if pool else 1), width // (2 if pool else 1)
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(channels, out_features)
        self.slope = slope
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial weights of the convolutions."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, self.slope, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.mean(self.blocks(x), (2, 3)))
