"""Bilinear samples with the border rule of mmcv's RoI kernels."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ._common import wide_dtype


def corners(y: Tensor, x: Tensor, height: int, width: int) -> list[tuple[Tensor, Tensor]]:
    """The four pixels around each point and their weights.

    ``y`` and ``x`` (any common shape, pixels) give four pairs of flat pixel index (``row * width + column``) and
    weight. Points more than one pixel outside, or not finite, weigh nothing; others are clamped to the border.
    """
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    rows, columns = _neighbours(y, height), _neighbours(x, width)
    return [
        (row * width + column, torch.where(inside, row_weight * column_weight, 0.0))
        for (row, row_weight), (column, column_weight) in product(rows, columns)
    ]


def _neighbours(position: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    position = position.clamp(0, size - 1)
    # Clamping the integer again keeps a NaN coordinate from becoming an out-of-range index.
    low = position.detach().floor().long().clamp(0, size - 1)
    high = (low + 1).clamp(max=size - 1)
    fraction = position - low
    return [(low, 1 - fraction), (high, fraction)]


def pixel_rows(features: Tensor) -> Tensor:
    """``(N, C, H, W)`` as one row of channels per pixel, ``(N * H * W, C)``."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.size(1))


def sample(rows: Tensor, base: Tensor, y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear values at ``(y, x)``: shape ``(*y.shape, C)``.

    ``base`` (broadcast against ``y``) is the row of the first pixel of each point's image in ``rows``.
    """
    return sum(weight.unsqueeze(-1) * rows[base + index] for index, weight in corners(y, x, height, width))


def scatter(grad: Tensor, plane: Tensor, y: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
    """Gradient of bilinear values with respect to the ``(N, C, H, W)`` features.

    ``grad``, ``y`` and ``x`` share a shape; ``plane`` (broadcast against them) is ``n * C + c``.
    """
    height, width = shape[-2:]
    total = torch.zeros(shape, dtype=wide_dtype(grad), device=grad.device).flatten()
    for index, weight in corners(y, x, height, width):
        place = plane * (height * width) + index
        total.index_add_(0, place.flatten(), (grad * weight).flatten())
    return total.view(shape)


class RoIGrid(NamedTuple):
    """Sample points of K RoIs: ``y`` (K, PH, GH), ``x`` (K, PW, GW), ``valid`` (K, GH, GW), ``size`` (K, 2) as h, w."""

    y: Tensor
    x: Tensor
    valid: Tensor
    size: Tensor


def roi_grid(rois: Tensor, bins: tuple[int, int], spatial_scale: float, sampling_ratio: int, aligned: bool) -> RoIGrid:
    """Sample points inside every bin of RoIs ``(K, 5)`` given as ``(image, x1, y1, x2, y2)`` in input pixels.

    ``sampling_ratio`` points per bin side, or as many as the bin is pixels high or wide when it is not positive.
    """
    scaled = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
    start, size = scaled[:, [1, 0]], (scaled[:, 2:] - scaled[:, :2])[:, [1, 0]]
    if not aligned:
        size = size.clamp(min=1)
    pooled = rois.new_tensor(bins)
    if sampling_ratio > 0:
        count = torch.full_like(size, sampling_ratio)
    else:
        count = (size / pooled).ceil().clamp(min=0)
    y, valid_y = _axis_points(start[:, 0], size[:, 0] / bins[0], count[:, 0], bins[0])
    x, valid_x = _axis_points(start[:, 1], size[:, 1] / bins[1], count[:, 1], bins[1])
    return RoIGrid(y, x, valid_y.unsqueeze(2) & valid_x.unsqueeze(1), size)


def _axis_points(start: Tensor, bin_size: Tensor, count: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    longest = max(1, int(count.max()))
    step = torch.arange(longest, device=start.device, dtype=start.dtype)
    first = start[:, None] + torch.arange(bins, device=start.device, dtype=start.dtype) * bin_size[:, None]
    inner = (step + 0.5) * (bin_size / count.clamp(min=1))[:, None]
    return first.unsqueeze(2) + inner.unsqueeze(1), step < count[:, None]


def grid_points(rois: Tensor, bins: tuple[int, int], spatial_scale: float, sampling_ratio: int) -> int:
    """Upper bound of the sample points of any one RoI, for cutting work into pieces."""
    if sampling_ratio > 0:
        return bins[0] * bins[1] * sampling_ratio**2
    size = ((rois[:, 3:] - rois[:, 1:3]) * spatial_scale).clamp(min=1).amax(0)
    return int((size[0] + bins[1]) * (size[1] + bins[0]))
