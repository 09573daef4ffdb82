"""A small transformer for sequences."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and a two-layer net, each behind a layer norm and added to its input (Xiong et al. 2020, "pre-LN")."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Sequences [N, length, features], of ``in_shape`` (length, features), to logits [N, out_features], no dropout."""

    def __init__(self, in_shape: tuple[int, int], out_features: int, width: int = 64, heads: int = 4, blocks: int = 2):
        super().__init__()
        length, features = in_shape
        self.embed, self.positions = nn.Linear(features, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, out_features)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.embed(x) + self.positions.weight)
        return self.head(self.norm(x.mean(1)))
