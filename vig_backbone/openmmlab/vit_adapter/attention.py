"""Deformable attention (arXiv 2010.04159) that places its samples in pixels and knows about padding."""

import torch
import torch.nn.functional as F
from mmcv.ops import MultiScaleDeformableAttention
from torch import Tensor
from vig_kernels.arguments import without_autocast

from .grids import Route


class DeformableAttention(MultiScaleDeformableAttention):
    """Each query reads `num_points` places on each level of a :class:`Route`, and chooses them and their weights.

    mmcv's module, parameters and initialisation, without dropout and identity. Sizes of maps are Python's integers
    here: mmcv's operator wants them on the device, and its stand-in in this package waits for them there.

    Args:
        dim: channels of queries and values.
        num_heads: must divide `dim` and ``dim * value_ratio``.
        num_levels: of the routes.
        num_points: samples for each query, head and level.
        value_ratio: channels that are read, as a part of `dim`.

    Raises:
        ValueError: if the heads do not fit.
    """

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int, value_ratio: float) -> None:
        if dim % num_heads or int(dim * value_ratio) % num_heads:
            raise ValueError(
                f"num_heads={num_heads} must divide the {dim} channels and, times deform_ratio={value_ratio}, "
                f"{int(dim * value_ratio)}"
            )
        super().__init__(
            dim, num_heads, num_levels, num_points, dropout=0.0, batch_first=True, value_proj_ratio=value_ratio
        )

    def forward(self, query: Tensor, value: Tensor, route: Route) -> Tensor:
        """[B, Q, C] and [B, K, C] -> [B, Q, C]."""
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        offsets = self.sampling_offsets(query).unflatten(-1, (heads, levels, points, 2))  # [B, Q, h, L, P, 2]
        weights = self.attention_weights(query).unflatten(-1, (heads, levels * points))
        weights = weights.softmax(-1).unflatten(-1, (levels, points))  # [B, Q, h, L, P]
        value = self.value_proj(value)
        if route.padding is not None:
            value = value.masked_fill(route.padding[..., None], 0.0)
        with without_autocast(value):
            read = read_levels(value.unflatten(-1, (heads, -1)), offsets, weights, route)
        return self.output_proj(read)


def read_levels(value: Tensor, offsets: Tensor, weights: Tensor, route: Route) -> Tensor:
    """Weighted sum of bilinear samples, [B, Q, h D], in float32 (float64 for float64).

    Args:
        value: the tokens of all levels, ``[B, K, h, D]``.
        offsets: ``[B, Q, h, L, P, 2]``, from the points of the route in pixels, x and y.
        weights: ``[B, Q, h, L, P]``.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)  # in bfloat16 places would be whole pixels from 256 on
    value, offsets, weights = value.to(dtype), offsets.to(dtype), weights.to(dtype)
    maps = value.split([grid.H * grid.W for grid in route.levels], 1)
    total = None
    for level, (grid, part) in enumerate(zip(route.levels, maps)):
        places = route.points[:, None, level, None].to(dtype) + offsets[:, :, :, level]  # [B, Q, h, P, 2]
        x, y = places.transpose(1, 2).flatten(0, 1).unbind(-1)
        places = torch.stack((x * (2 / grid.W) - 1, y * (2 / grid.H) - 1), -1)  # [B h, Q, P, 2]
        part = part.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, (grid.H, grid.W))  # [B h, D, H, W]
        samples = F.grid_sample(part, places, mode="bilinear", padding_mode="zeros", align_corners=False)
        read = (samples * weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)  # [B h, D, Q]
        total = read if total is None else total + read
    B, _, h, D = value.shape
    return total.view(B, h * D, -1).transpose(1, 2)
