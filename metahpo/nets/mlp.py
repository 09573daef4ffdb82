"""A multilayer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from metahpo.nets.arguments import NamedSizes, check_shape, check_size


class MLP(NamedSizes, nn.Module):
    """Fully connected layers with ReLU between them; two hidden layers of 40 are the sinusoid net of Finn et al. 2017.

    in_shape: shape of one input, flattened; out_features: outputs; hidden: width of each hidden layer. [N, *in_shape]
    in, [N, out_features] out.
    """

    def __init__(self, in_shape: Sequence[int], out_features: int, hidden: Sequence[int] = (40, 40)):
        super().__init__()
        size = math.prod(check_shape(self, "in_shape", in_shape))
        out_features = check_size(self, "out_features", out_features)
        hidden = check_shape(self, "hidden", hidden)
        layers: list[nn.Module] = [nn.Flatten()]
        for width in hidden:
            layers += [nn.Linear(size, width), nn.ReLU()]
            size = width
        self.layers = nn.Sequential(*layers, nn.Linear(size, out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
