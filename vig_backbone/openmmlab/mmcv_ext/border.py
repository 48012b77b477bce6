"""Border Align: the largest bilinear sample along each side of a box."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._common import kernel_mode, wide, wide_dtype
from ._sampling import pixel_rows, sample, scatter

__all__ = ["border_align_backward", "border_align_forward"]


def border_align_forward(input: Tensor, boxes: Tensor, output: Tensor, argmax_idx: Tensor, pool_size: int) -> None:
    """Fill ``output`` and ``argmax_idx`` (N, C, B, 4) (contract of ``mmcv.ops.border_align``).

    ``input`` (N, 4 * C, H, W) holds the channels for the top, left, bottom and right side; ``boxes`` (N, B, 4) as
    x1, y1, x2, y2 in feature pixels. Each side is sampled at ``pool_size + 1`` points, top and left from
    (x1, y1), bottom and right from (x2, y2); ``argmax_idx`` numbers the first largest one.
    """
    with kernel_mode(input):
        features, corners = wide(input), boxes.to(wide_dtype(input))
        images, _, height, width = features.shape
        base = (torch.arange(images, device=input.device) * (height * width)).unsqueeze(1)
        channels = output.size(1)
        for side, (start, step) in enumerate(_sides(corners, pool_size)):
            rows = pixel_rows(features[:, side * channels : (side + 1) * channels])
            best = place = None
            for point in range(pool_size + 1):
                x, y = (start + point * step).unbind(-1)
                value = sample(rows, base, y, x, height, width)
                if best is None:
                    best, place = value, torch.zeros_like(value, dtype=argmax_idx.dtype)
                    continue
                better = value > best
                best, place = torch.where(better, value, best), place.masked_fill(better, point)
            output[..., side], argmax_idx[..., side] = best.transpose(1, 2).to(output.dtype), place.transpose(1, 2)


def border_align_backward(
    grad_output: Tensor, boxes: Tensor, argmax_idx: Tensor, grad_input: Tensor, pool_size: int
) -> None:
    """Fill ``grad_input`` (N, 4 * C, H, W) from ``grad_output`` and ``argmax_idx`` (N, C, B, 4)."""
    with kernel_mode(grad_output):
        grad, corners = wide(grad_output), boxes.to(wide_dtype(grad_output))
        images, channels = grad.shape[:2]
        plane = torch.arange(images * channels, device=grad.device).view(images, channels, 1)
        for side, (start, step) in enumerate(_sides(corners, pool_size)):
            chosen = start.unsqueeze(1) + argmax_idx[..., side, None] * step.unsqueeze(1)
            x, y = chosen.unbind(-1)
            part = grad_input[:, side * channels : (side + 1) * channels]
            part.copy_(scatter(grad[..., side], plane, y, x, part.shape))


def _sides(boxes: Tensor, pool_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """First point and step (N, B, 2) as x, y of the top, left, bottom and right side."""
    low, high = boxes[..., :2], boxes[..., 2:]
    along = (high - low) / pool_size
    across, down = along * along.new_tensor([1, 0]), along * along.new_tensor([0, 1])
    yield low, across
    yield low, down
    yield high, -across
    yield high, -down
