"""Multi-scale deformable attention and the point-wise spatial attention mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ._common import gradients, kernel_mode, wide, wide_dtype

__all__ = ["ms_deform_attn_backward", "ms_deform_attn_forward", "psamask_backward", "psamask_forward"]

_COLLECT = 0


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int,
) -> Tensor:
    """Weighted bilinear samples (B, Q, M * D) (contract of ``MultiScaleDeformableAttnFunction`` in mmcv.ops).

    ``value`` (B, K, M, D) with the pixels of all levels in a row; ``spatial_shapes`` (L, 2) as height, width;
    ``level_start_index`` (L,); ``sampling_loc`` (B, Q, M, L, P, 2) as x, y in [0, 1]; ``attn_weight``
    (B, Q, M, L, P). ``im2col_step`` is not needed.
    """
    with kernel_mode(value):
        operands = (value, sampling_loc, attn_weight)
        levels = _levels(spatial_shapes, level_start_index, *(t.to(wide_dtype(value)) for t in operands))
        total = sum(attend(*parts) for _, _, attend, parts in levels)
        batch, queries, heads = sampling_loc.shape[:3]
        return total.view(batch, heads * value.size(-1), queries).transpose(1, 2).contiguous().to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Fill the three gradients; ``grad_output`` (B, Q, M * D). One level is held in memory at a time."""
    with kernel_mode(value):
        operands = (value, sampling_loc, attn_weight)
        batch, queries, heads = sampling_loc.shape[:3]
        grad = wide(grad_output).transpose(1, 2).reshape(batch * heads, value.size(-1), queries)
        levels = _levels(spatial_shapes, level_start_index, *(t.to(wide_dtype(value)) for t in operands))
        for level, pixels, attend, parts in levels:
            to_value, to_place, to_weight = gradients(attend, parts, grad)
            grad_value[:, pixels] = to_value.to(grad_value.dtype)
            grad_sampling_loc[:, :, :, level] = to_place.to(grad_sampling_loc.dtype)
            grad_attn_weight[:, :, :, level] = to_weight.to(grad_attn_weight.dtype)


def psamask_forward(
    input: Tensor,
    output: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Spread masks centred on each pixel over the image (contract of ``mmcv.ops.PSAMask``).

    ``input`` (N, h_mask * w_mask, H, W). ``output`` (N, H * W, H, W): with ``psa_type`` 0 (collect) the first axis
    is the pixel under the mask and the last two the mask's centre, with 1 (distribute) the other way round.
    Places that the mask of a pixel does not reach are 0.
    """
    with kernel_mode(input):
        masks = input.view(num_, h_mask, w_mask, h_feature, w_feature)
        target = _by_centre(output, psa_type, (h_feature, w_feature))
        column, valid = _shifted(w_feature, w_mask, w_feature, half_w_mask, 1, input.device)
        output.zero_()
        for centre, under, row in _reach(h_feature, h_mask, half_h_mask):
            picked = masks[:, row, :, centre]
            picked = picked.gather(2, column.expand(*picked.shape[:2], -1, -1)) * valid
            target[:, under, :, centre] = picked.to(output.dtype)


def psamask_backward(
    grad_output: Tensor,
    grad_input: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Fill ``grad_input`` (N, h_mask * w_mask, H, W) from ``grad_output`` (N, H * W, H, W)."""
    with kernel_mode(grad_output):
        masks = grad_input.view(num_, h_mask, w_mask, h_feature, w_feature)
        source = _by_centre(grad_output.contiguous(), psa_type, (h_feature, w_feature))
        column, valid = _shifted(w_mask, w_feature, w_feature, half_w_mask, -1, grad_output.device)
        grad_input.zero_()
        for centre, under, row in _reach(h_feature, h_mask, half_h_mask):
            picked = source[:, under, :, centre]
            picked = picked.gather(2, column.expand(*picked.shape[:2], -1, -1)) * valid
            masks[:, row, :, centre] = picked.to(grad_input.dtype)


_Level = tuple[int, slice, Callable[..., Tensor], tuple[Tensor, Tensor, Tensor]]


def _levels(shapes: Tensor, starts: Tensor, value: Tensor, places: Tensor, weights: Tensor) -> Iterator[_Level]:
    """Number, pixels, function and operands of every level."""
    for level, ((height, width), start) in enumerate(zip(shapes.tolist(), starts.tolist())):
        pixels = slice(start, start + height * width)
        parts = (value[:, pixels], places[:, :, :, level], weights[:, :, :, level])
        yield level, pixels, partial(_attend, size=(height, width)), parts


def _attend(value: Tensor, places: Tensor, weights: Tensor, size: tuple[int, int]) -> Tensor:
    """One level: (B, HW, M, D), (B, Q, M, P, 2), (B, Q, M, P) to (B * M, D, Q)."""
    maps = value.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, size)
    grid = (2 * places - 1).transpose(1, 2).flatten(0, 1)
    samples = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (samples * weights.transpose(1, 2).flatten(0, 1).unsqueeze(1)).sum(-1)


def _by_centre(spread: Tensor, psa_type: int, size: tuple[int, int]) -> Tensor:
    """View (N, H, W, H, W) of the spread masks as pixel under the mask, then centre of the mask."""
    view = spread.view(spread.size(0), *size, *size)
    return view if psa_type == _COLLECT else view.permute(0, 3, 4, 1, 2)


def _reach(size: int, mask: int, half: int) -> Iterator[tuple[int, slice, slice]]:
    """For every row of centres: the image rows under the mask and the mask rows over them."""
    for centre in range(size):
        first, last = max(0, half - centre), min(mask, size + half - centre)
        if first < last:
            yield centre, slice(first + centre - half, last + centre - half), slice(first, last)


def _shifted(
    length: int, limit: int, centres: int, half: int, sign: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Index (length, centres) of the mask column over an image column (``sign`` 1) or under it (-1), and validity."""
    index = torch.arange(length, device=device)[:, None] + sign * (half - torch.arange(centres, device=device))
    return index.clamp(0, limit - 1), (index >= 0) & (index < limit)
