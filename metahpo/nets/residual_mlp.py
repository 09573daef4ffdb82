"""A small residual net of fully connected layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metahpo.nets.arguments import NamedSizes, check_shape, check_size


class ResidualLayers(nn.Module):
    """x + second(relu(first(x)))."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x)))


class ResidualMLP(NamedSizes, nn.Module):
    """A linear layer, ``blocks`` pairs of layers around which the input passes (He et al. 2016, without convolutions
    and normalisation), a linear layer.

    in_shape: shape of one input, flattened; out_features: outputs; width: of every layer between. [N, *in_shape] in,
    [N, out_features] out.
    """

    def __init__(self, in_shape: Sequence[int], out_features: int, width: int = 32, blocks: int = 3):
        super().__init__()
        in_shape = check_shape(self, "in_shape", in_shape)
        out_features, width = check_size(self, "out_features", out_features), check_size(self, "width", width)
        blocks = check_size(self, "blocks", blocks, at_least=0)
        self.embed = nn.Linear(math.prod(in_shape), width)
        self.blocks = nn.Sequential(*(ResidualLayers(width) for _ in range(blocks)))
        self.head = nn.Linear(width, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x.flatten(1))))
