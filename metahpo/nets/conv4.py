"""Conv4, the four-block convolutional net of the few-shot papers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metahpo.checks import check_number
from metahpo.errors import NetArgumentError
from metahpo.nets.arguments import NamedSizes, check_shape, check_size


class ConvBlock(nn.Sequential):
    """3x3 convolution (padding 1, bias), batch normalisation, leaky ReLU, 2x2 max pooling."""

    def __init__(self, in_channels: int, filters: int, slope: float, pool: bool):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, filters, 3, padding=1)
        self.bn = nn.BatchNorm2d(filters)
        self.activation = nn.LeakyReLU(slope) if slope else nn.ReLU()
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()


class Conv4(NamedSizes, nn.Module):
    """Four ``ConvBlock``s and a linear layer, as in MAML++ (Antoniou et al. 2019): Xavier-uniform weights, zero biases.

    in_shape: (C, H, W) of the images; out_features: outputs (the ways); filters: channels of every block (64 on
    Omniglot, 48 on Mini-ImageNet); slope: of the leaky ReLU, 0 for ReLU. Images [N, C, H, W] in, logits [N,
    out_features] out. Blocks stop pooling where the image has shrunk to one pixel a side.
    """

    def __init__(self, in_shape: tuple[int, int, int], out_features: int, filters: int = 64, slope: float = 0.01):
        super().__init__()
        channels, height, width = check_shape(self, "in_shape", in_shape, 3)
        out_features, filters = check_size(self, "out_features", out_features), check_size(self, "filters", filters)
        slope = check_number(self, "slope", slope, at_least=0, error=NetArgumentError)
        blocks = []
        for _ in range(4):
            pool = min(height, width) >= 2
            blocks.append(ConvBlock(channels, filters, slope, pool))
            channels, height, width = filters, height // (2 if pool else 1), width // (2 if pool else 1)
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(channels * height * width, out_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial weights of convolutions and of the linear layer."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.flatten(self.blocks(x), 1))
