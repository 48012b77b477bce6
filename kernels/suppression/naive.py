"""The definition of the suppression, in PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import at_least_float32


def naive_grouped_nms(boxes: Tensor, valid: Tensor, counts: Sequence[int], iou_threshold: float) -> Tensor:
    """The definition that every other form must agree with; a step for every box.

    Shapes as in :func:`vig_kernels.grouped_nms`.
    """
    boxes, kept = at_least_float32(boxes), valid.clone()
    for image_boxes, image_kept in zip(boxes, kept):
        for group, alive in zip(image_boxes.split(list(counts)), image_kept.split(list(counts))):
            hits = _hits(group, iou_threshold)
            for i in range(len(group)):
                alive[i + 1 :] &= ~(hits[i, i + 1 :] & alive[i])
    return kept


def _hits(boxes: Tensor, iou_threshold: float) -> Tensor:
    """Whether each overlaps with each by more, [n, n]; two of no area do not."""
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    upper, lower = torch.maximum(boxes[:, None, :2], boxes[:, :2]), torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
    common = (lower - upper).clamp(min=0).prod(2)
    return common > iou_threshold * (areas[:, None] + areas - common)
