"""Injector and extractor: what ViG and the pyramid give each other around a few blocks.

`x` are ViG's tokens, [B, H, W, C]; `c` those of the pyramid at strides 8, 16 and 32, one grid after the other,
[B, K, C].
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers import DepthwiseConv3x3, DropPath, LayerNorm
from .attention import DeformableAttention
from .grids import Grid, Route

PYRAMID = (8, 16, 32)  # strides of c


class Injector(nn.Module):
    """``x + gamma * attention(x, c)``, gamma zero at first: training starts from the backbone as it is.

    Args:
        dim: channels C.
        num_heads, num_points, deform_ratio: see :class:`DeformableAttention`.
    """

    def __init__(self, dim: int, num_heads: int, num_points: int, deform_ratio: float) -> None:
        super().__init__()
        self.query_norm = LayerNorm(dim, eps=1e-6)
        self.feat_norm = LayerNorm(dim, eps=1e-6)
        self.attn = DeformableAttention(dim, num_heads, len(PYRAMID), num_points, deform_ratio)
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, c: Tensor, route: Route) -> Tensor:
        query, _ = self.query_norm.before_products(x.flatten(1, 2))
        value, _ = self.feat_norm.before_products(c)
        return x + (self.gamma * self.attn(query, value, route)).view(x.shape)


class Extractor(nn.Module):
    """``c + attention(c, x)``, then a feed-forward network with a convolution, as a residual branch.

    Args:
        dim: channels C.
        num_heads, num_points, deform_ratio: see :class:`DeformableAttention`.
        hidden_dim: channels inside of the feed-forward network.
        drop_path_rate: with which samples go without that network in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_points: int,
        deform_ratio: float,
        hidden_dim: int,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.query_norm = LayerNorm(dim, eps=1e-6)
        self.feat_norm = LayerNorm(dim, eps=1e-6)
        self.attn = DeformableAttention(dim, num_heads, 1, num_points, deform_ratio)
        self.ffn_norm = LayerNorm(dim, eps=1e-6)
        self.ffn = ConvFFN(dim, hidden_dim)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, c: Tensor, x: Tensor, route: Route, grids: Sequence[Grid]) -> Tensor:
        query, _ = self.query_norm.before_products(c)
        value, _ = self.feat_norm.before_products(x.flatten(1, 2))
        y, c = self.ffn_norm.before_products(c, self.attn(query, value, route))
        return c + self.drop_path(self.ffn(y, grids))


class ConvFFN(nn.Module):
    """Two linear layers, between them the same depthwise convolution on each grid by itself, and GELU."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = DepthwiseConv3x3(hidden_dim)
        self.dwconv_bias = nn.Parameter(torch.zeros(hidden_dim))
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, c: Tensor, grids: Sequence[Grid]) -> Tensor:
        parts = self.fc1(c).split([grid.H * grid.W for grid in grids], 1)
        maps = (part.unflatten(1, (grid.H, grid.W)) for part, grid in zip(parts, grids))
        parts = [self.dwconv(x, grid.sizes).flatten(1, 2) for x, grid in zip(maps, grids)]
        return self.fc2(F.gelu(torch.cat(parts, 1) + self.dwconv_bias))
