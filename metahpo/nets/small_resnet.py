"""A small residual net for small images."""

from __future__ import annotations

import math

from torch import Tensor, nn

from metahpo.checks import check_choice
from metahpo.errors import NetArgumentError
from metahpo.nets.arguments import NamedSizes, check_shape, check_size

NORMS = {"batch": nn.BatchNorm2d, "group": lambda width: nn.GroupNorm(math.gcd(width, 4), width)}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with normalisation around which the input passes; a 1x1 convolution fits it where the
    shape changes (He et al. 2016, "Deep Residual Learning", figure 2 and option B)."""

    def __init__(self, in_channels: int, width: int, stride: int, norm: str):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, stride, 1, bias=False),
            NORMS[norm](width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            NORMS[norm](width),
        )
        same = in_channels == width and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, width, 1, stride, bias=False)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.layers(x) + self.shortcut(x))


class SmallResNet(NamedSizes, nn.Module):
    """A 3x3 convolution with normalisation, ``blocks`` basic blocks, global average pooling, a linear layer.

    in_shape: (C, H, W) of the images; out_features: outputs; width: channels of the first block; every second block
    after it halves the image and doubles the channels; norm: "batch" or "group" (four groups).

    Images [N, C, H, W] in, logits [N, out_features] out.
    """

    def __init__(
        self, in_shape: tuple[int, int, int], out_features: int, width: int = 16, blocks: int = 3, norm: str = "batch"
    ):
        super().__init__()
        in_shape = check_shape(self, "in_shape", in_shape, 3)
        out_features, width = check_size(self, "out_features", out_features), check_size(self, "width", width)
        blocks = check_size(self, "blocks", blocks, at_least=0)
        check_choice(self, "norm", norm, NORMS, error=NetArgumentError)
        self.stem = nn.Sequential(nn.Conv2d(in_shape[0], width, 3, 1, 1, bias=False), NORMS[norm](width), nn.ReLU())
        layers, channels = [], width
        for index in range(blocks):
            halve = index % 2 == 1
            layers.append(BasicBlock(channels, channels * (2 if halve else 1), 2 if halve else 1, norm))
            channels *= 2 if halve else 1
        self.blocks = nn.Sequential(*layers)
        self.linear = nn.Linear(channels, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(self.stem(x)).mean((2, 3)))
