"""Non-maximum suppression of axis-aligned boxes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms as torchvision_nms

from ._common import kernel_mode, wide

__all__ = ["nms", "nms_match", "softnms"]

_NAIVE, _LINEAR, _GAUSSIAN = range(3)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the kept boxes, best score first (contract of ``mmcv.ops.nms``).

    ``boxes`` (N, 4) as x1, y1, x2, y2 in pixels, ``scores`` (N,). Sides are ``x2 - x1 + offset``. A box goes when
    its IoU with a better kept one is above ``iou_threshold``.
    """
    with kernel_mode(boxes):
        grown = wide(boxes).clone()
        grown[:, 2:] += offset
        return torchvision_nms(grown, scores.to(grown.dtype), float(iou_threshold))


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (contract of ``mmcv.ops.soft_nms``): the kept indices, and their boxes and new scores in ``dets``.

    ``boxes`` (N, 4), ``scores`` (N,), ``dets`` (N, 5) of which the first rows are filled. ``method`` is 0 (drop),
    1 (score times ``1 - IoU``) or 2 (score times ``exp(-IoU^2 / sigma)``). Equal scores go in the order given.
    Raises ``ValueError`` for another method.
    """
    if method not in (_NAIVE, _LINEAR, _GAUSSIAN):
        raise ValueError(f"soft-NMS method must be 0, 1 or 2, got {method}")
    with kernel_mode(boxes):
        rest, score = wide(boxes), wide(scores).clone()
        index = torch.arange(len(rest), device=boxes.device)
        kept = []
        while len(index):
            top = int(score.argmax())
            best = rest[top]
            dets[len(kept), :4], dets[len(kept), 4] = best.to(dets.dtype), score[top].to(dets.dtype)
            kept.append(index[top])
            score = score * _decay(_iou(best, rest, offset), iou_threshold, sigma, method)
            alive = ~(score < min_score)
            alive[top] = False
            rest, score, index = rest[alive], score[alive], index[alive]
        return torch.stack(kept) if kept else index


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of boxes, each led by a kept box (contract of ``mmcv.ops.nms_match``).

    ``dets`` (N, 5) as x1, y1, x2, y2, score. Every group lists indices by falling score: the kept box, then those
    whose IoU with it is at least ``iou_threshold`` and that no better group took.
    """
    with kernel_mode(dets):
        boxes = wide(dets[:, :4])
        order = dets[:, 4].sort(descending=True, stable=True).indices
        groups = []
        while len(order):
            taken = _iou(boxes[order[0]], boxes[order], 0) >= iou_threshold
            taken[0] = True
            groups.append(order[taken].tolist())
            order = order[~taken]
        return groups


def _decay(iou: Tensor, iou_threshold: float, sigma: float, method: int) -> Tensor:
    if method == _GAUSSIAN:
        return torch.exp(-iou.square() / sigma)
    reduced = torch.zeros_like(iou) if method == _NAIVE else 1 - iou
    return torch.where(iou >= iou_threshold, reduced, 1.0)


def _iou(box: Tensor, boxes: Tensor, offset: int) -> Tensor:
    sides = (torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2]) + offset).clamp(min=0)
    shared = sides.prod(1)
    union = (box[2:] - box[:2] + offset).prod() + (boxes[:, 2:] - boxes[:, :2] + offset).prod(1) - shared
    return torch.where(union > 0, shared / union, 0.0)
