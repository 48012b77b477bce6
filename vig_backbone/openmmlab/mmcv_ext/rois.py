"""RoI Align, RoI Pool and deformable RoI pooling."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ._common import chunk_length, gradients, kernel_mode, wide, wide_dtype
from ._sampling import RoIGrid, grid_points, pixel_rows, roi_grid, sample, scatter

__all__ = [
    "deform_roi_pool_backward",
    "deform_roi_pool_forward",
    "roi_align_backward",
    "roi_align_forward",
    "roi_pool_backward",
    "roi_pool_forward",
]

_MAX = 0
_NOTHING = -1


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill ``output`` (K, C, aligned_height, aligned_width) (contract of ``mmcv.ops.roi_align``).

    ``input`` (N, C, H, W); ``rois`` (K, 5) as image, x1, y1, x2, y2 in input pixels times ``1 / spatial_scale``.
    ``pool_mode`` 1 averages the samples of a bin; 0 takes the largest and fills ``argmax_y`` and ``argmax_x``
    (shaped as ``output``) with its place in feature pixels, or -1 and a value of 0 for an empty bin.
    """
    bins = (aligned_height, aligned_width)
    with kernel_mode(input):
        features, boxes = wide(input), rois.to(wide_dtype(input))
        if pool_mode != _MAX:
            pooled = torch.ops.torchvision.roi_align(
                features, boxes, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
            )
            output.copy_(pooled)
            return
        rows = pixel_rows(features)
        for part in _pieces(boxes, bins, spatial_scale, sampling_ratio, features.size(1)):
            grid = roi_grid(boxes[part], bins, spatial_scale, sampling_ratio, aligned)
            value, y, x = _largest_sample(rows, boxes[part], grid, features.shape)
            output[part], argmax_y[part], argmax_x[part] = (t.to(output.dtype) for t in (value, y, x))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill ``grad_input`` (N, C, H, W) from ``grad_output`` (K, C, PH, PW); arguments as in the forward."""
    with kernel_mode(grad_output):
        grad, boxes = wide(grad_output), rois.to(wide_dtype(grad_output))
        if pool_mode != _MAX:
            size = (spatial_scale, aligned_height, aligned_width, *grad_input.shape)
            total = torch.ops.torchvision._roi_align_backward(grad, boxes, *size, sampling_ratio, aligned)
        else:
            grad = torch.where(argmax_y == _NOTHING, 0.0, grad)
            plane = _planes(boxes, grad_input.size(1))
            total = scatter(grad, plane, argmax_y.to(grad.dtype), argmax_x.to(grad.dtype), grad_input.shape)
        grad_input.copy_(total)


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Fill ``output`` and ``argmax`` (K, C, pooled_height, pooled_width) (contract of ``mmcv.ops.roi_pool``).

    ``input`` (N, C, H, W), ``rois`` (K, 5) with both corners inside the box. Unlike torchvision's operator, mmcv
    does not round the scaled box. ``argmax`` is the flat pixel index, -1 for an empty bin, whose value is 0.
    """
    bins = (pooled_height, pooled_width)
    with kernel_mode(input):
        boxes, rows = rois.to(wide_dtype(input)), pixel_rows(input)
        for part in _pieces(boxes, bins, spatial_scale, 0, input.size(1)):
            y, x = _pool_bins(boxes[part], bins, spatial_scale, input.shape[-2:])
            output[part], argmax[part] = _largest_pixel(rows, boxes[part], y, x, input.shape)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Fill ``grad_input`` (N, C, H, W) from ``grad_output`` and the ``argmax`` of the forward."""
    with kernel_mode(grad_output):
        grad = torch.where(argmax == _NOTHING, 0.0, wide(grad_output))
        height, width = grad_input.shape[-2:]
        place = _planes(rois, grad_input.size(1)) * (height * width) + argmax.clamp(min=0)
        total = grad.new_zeros(grad_input.numel()).index_add_(0, place.flatten(), grad.flatten())
        grad_input.copy_(total.view_as(grad_input))


def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Fill ``output`` (K, C, PH, PW) with the mean of shifted bins (contract of ``mmcv.ops.deform_roi_pool``).

    ``offset`` (K, 2, PH, PW) as x then y, in units of ``gamma`` times the RoI size; empty means no shift.
    """
    bins = (pooled_height, pooled_width)
    with kernel_mode(input):
        features, boxes = wide(input), rois.to(wide_dtype(input))
        shift = _shift(offset, boxes, bins)
        for part in _pieces(boxes, bins, spatial_scale, sampling_ratio, features.size(1)):
            grid = roi_grid(boxes[part], bins, spatial_scale, sampling_ratio, True)
            output[part] = _shifted_mean(features, shift[part], boxes[part], grid, gamma).to(output.dtype)


def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Fill ``grad_input`` (N, C, H, W) and, unless empty, ``grad_offset`` (K, 2, PH, PW)."""
    bins = (pooled_height, pooled_width)
    with kernel_mode(grad_output):
        features, boxes = wide(input), rois.to(wide_dtype(input))
        shift = _shift(offset, boxes, bins)
        total = torch.zeros_like(features)
        for part in _pieces(boxes, bins, spatial_scale, sampling_ratio, features.size(1)):
            grid = roi_grid(boxes[part], bins, spatial_scale, sampling_ratio, True)
            pool = partial(_shifted_mean, rois=boxes[part], grid=grid, gamma=gamma)
            to_features, to_shift = gradients(pool, (features, shift[part]), grad_output[part])
            total += to_features
            if grad_offset.numel():
                grad_offset[part] = to_shift.to(grad_offset.dtype)
        grad_input.copy_(total)


def _pieces(
    rois: Tensor, bins: tuple[int, int], spatial_scale: float, sampling_ratio: int, channels: int
) -> Iterator[slice]:
    if not len(rois):
        return
    step = chunk_length(channels * grid_points(rois, bins, spatial_scale, sampling_ratio))
    for start in range(0, len(rois), step):
        yield slice(start, start + step)


def _planes(rois: Tensor, channels: int) -> Tensor:
    """(K, C, 1, 1) index ``n * C + c`` of the feature plane of each pooled plane."""
    channel = torch.arange(channels, device=rois.device)
    return (rois[:, 0].long()[:, None] * channels + channel)[:, :, None, None]


def _largest_sample(rows: Tensor, rois: Tensor, grid: RoIGrid, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    height, width = shape[-2:]
    # (K, PH, PW, GH, GW), so that the samples of a bin end up last and in reading order.
    y, x = torch.broadcast_tensors(grid.y[:, :, None, :, None], grid.x[:, None, :, None, :])
    base = (rois[:, 0].long() * (height * width)).view(-1, 1, 1, 1, 1)
    values = sample(rows, base, y, x, height, width)
    values = values.masked_fill(~grid.valid[:, None, None, :, :, None], -torch.inf)
    best, place = values.flatten(3, 4).max(3)
    empty = best == -torch.inf
    best, y, x = (
        torch.where(empty, filler, chosen)
        for filler, chosen in (
            (0.0, best),
            (float(_NOTHING), y.flatten(3).gather(3, place)),
            (float(_NOTHING), x.flatten(3).gather(3, place)),
        )
    )
    return best.permute(0, 3, 1, 2), y.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)


def _pool_bins(
    rois: Tensor, bins: tuple[int, int], spatial_scale: float, size: torch.Size
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    start, end = rois[:, [2, 1]] * spatial_scale, (rois[:, [4, 3]] + 1) * spatial_scale
    axes = []
    for axis in range(2):
        step = torch.arange(bins[axis] + 1, device=rois.device, dtype=rois.dtype)
        edge = start[:, axis, None] + step * ((end - start)[:, axis, None] / bins[axis])
        low = edge[:, :-1].floor().long().clamp(0, size[axis])
        high = edge[:, 1:].ceil().long().clamp(0, size[axis])
        longest = max(1, int((high - low).max()))
        pixel = low.unsqueeze(2) + torch.arange(longest, device=rois.device)
        # A bin shorter than the longest repeats its last pixel, which does not change a maximum.
        axes.append((torch.minimum(pixel, high.unsqueeze(2) - 1).clamp(min=0), high <= low))
    return axes[0], axes[1]


def _largest_pixel(
    rows: Tensor, rois: Tensor, y: tuple[Tensor, Tensor], x: tuple[Tensor, Tensor], shape: torch.Size
) -> tuple[Tensor, Tensor]:
    height, width = shape[-2:]
    pixel = (y[0][:, :, None, :, None] * width + x[0][:, None, :, None, :]).flatten(3)
    base = (rois[:, 0].long() * (height * width)).view(-1, 1, 1, 1)
    best, place = rows[base + pixel].max(3)
    chosen = pixel.gather(3, place)
    empty = (y[1][:, :, None] | x[1][:, None, :]).unsqueeze(3)
    best, chosen = best.masked_fill(empty, 0), chosen.masked_fill(empty, _NOTHING)
    return best.permute(0, 3, 1, 2), chosen.permute(0, 3, 1, 2).int()


def _shift(offset: Tensor, rois: Tensor, bins: tuple[int, int]) -> Tensor:
    return offset.to(rois.dtype) if offset.numel() else rois.new_zeros(len(rois), 2, *bins)


def _shifted_mean(features: Tensor, shift: Tensor, rois: Tensor, grid: RoIGrid, gamma: float) -> Tensor:
    height, width = features.shape[-2:]
    moved = gamma * shift * grid.size.flip(1)[:, :, None, None]
    y = grid.y[:, :, None, :, None] + moved[:, 1, :, :, None, None]
    x = grid.x[:, None, :, None, :] + moved[:, 0, :, :, None, None]
    y, x = torch.broadcast_tensors(y, x)
    base = (rois[:, 0].long() * (height * width)).view(-1, 1, 1, 1, 1)
    valid = grid.valid[:, None, None, :, :, None]
    total = (sample(pixel_rows(features), base, y, x, height, width) * valid).sum((3, 4))
    return (total / valid.sum((3, 4)).clamp(min=1)).permute(0, 3, 1, 2)
