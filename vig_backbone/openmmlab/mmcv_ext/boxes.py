"""Overlaps of axis-aligned, rotated and quadrilateral boxes, and the NMS of the latter two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._common import chunk_length, kernel_mode, wide

__all__ = ["bbox_overlaps", "box_iou_quadri", "box_iou_rotated", "nms_quadri", "nms_rotated"]

_IOU = 0
# Boxes smaller than this overlap with nothing, as in mmcv's kernels.
_MIN_AREA = 1e-14
# A quadrilateral clipped by four half-planes: 4 * 2^4 vertices of two coordinates.
_CLIPPED_ELEMENTS = 128
_NMS_BLOCK = 256


def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Fill ``ious`` (M, N), or (M,) when ``aligned``, for boxes (M, 4) and (N, 4) (``mmcv.ops.bbox_overlaps``).

    ``mode`` 0 divides by the union, 1 by the area of the first box. Sides are ``x2 - x1 + offset``. Two boxes
    without area give 0.
    """
    with kernel_mode(bboxes1):
        first, second = wide(bboxes1), wide(bboxes2)
        if not aligned:
            first = first.unsqueeze(1)
        top_left = torch.maximum(first[..., :2], second[..., :2])
        bottom_right = torch.minimum(first[..., 2:], second[..., 2:])
        shared = (bottom_right - top_left + offset).clamp(min=0).prod(-1)
        area = (first[..., 2:] - first[..., :2] + offset).prod(-1)
        if mode == _IOU:
            area = area + (second[..., 2:] - second[..., :2] + offset).prod(-1) - shared
        area = area.clamp(min=offset)
        ious.copy_(torch.where(area > 0, shared / area, 0.0))


def box_iou_rotated(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode_flag: int, aligned: bool) -> None:
    """Fill ``ious`` for rotated boxes (M, 5), (N, 5) as cx, cy, w, h, angle (``mmcv.ops.box_iou_rotated``).

    The angle is in radians, clockwise with y down. ``ious`` is (M,) when ``aligned``, else the flat (M * N,).
    ``mode_flag`` 0 divides by the union, 1 by the area of the first box.
    """
    with kernel_mode(bboxes1):
        ious.copy_(_overlap(_from_rotated(bboxes1), _from_rotated(bboxes2), mode_flag, aligned).view_as(ious))


def box_iou_quadri(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode_flag: int, aligned: bool) -> None:
    """As :func:`box_iou_rotated` for convex quadrilaterals (M, 8), (N, 8) as x1, y1, ..., x4, y4, in either turn
    (``mmcv.ops.box_iou_quadri``)."""
    with kernel_mode(bboxes1):
        ious.copy_(_overlap(_from_quadri(bboxes1), _from_quadri(bboxes2), mode_flag, aligned).view_as(ious))


def nms_rotated(
    dets: Tensor,
    scores: Tensor,
    order: Tensor,
    dets_sorted: Tensor,
    labels: Tensor,
    iou_threshold: float,
    multi_label: bool,
) -> Tensor:
    """Indices of the kept rotated boxes, best first (contract of ``mmcv.ops.nms_rotated``).

    ``dets_sorted`` (N, 5), or (N, 6) with the label last when ``multi_label``, in the order ``order`` (N,). Boxes
    of different labels do not suppress each other.
    """
    return _sorted_nms(dets_sorted, order, iou_threshold, multi_label, 5, _from_rotated)


def nms_quadri(
    dets: Tensor, scores: Tensor, order: Tensor, dets_sorted: Tensor, iou_threshold: float, multi_label: bool
) -> Tensor:
    """As :func:`nms_rotated` for quadrilaterals (N, 8), or (N, 9) with the label (``mmcv.ops.nms_quadri``)."""
    return _sorted_nms(dets_sorted, order, iou_threshold, multi_label, 8, _from_quadri)


@dataclass(frozen=True)
class _Quads:
    """N convex quadrilaterals: ``center`` (N, 2), ``corners`` (N, 4, 2) relative to it, ``area`` (N,)."""

    center: Tensor
    corners: Tensor
    area: Tensor

    def __getitem__(self, rows: Tensor | slice) -> _Quads:
        return _Quads(self.center[rows], self.corners[rows], self.area[rows])


def _from_rotated(boxes: Tensor) -> _Quads:
    boxes = wide(boxes)
    cos, sin = boxes[:, 4].cos(), boxes[:, 4].sin()
    across = torch.stack([cos, sin], 1) * boxes[:, 2:3] / 2
    down = torch.stack([-sin, cos], 1) * boxes[:, 3:4] / 2
    corners = torch.stack([-across - down, across - down, across + down, down - across], 1)
    return _Quads(boxes[:, :2], corners, boxes[:, 2] * boxes[:, 3])


def _from_quadri(boxes: Tensor) -> _Quads:
    points = wide(boxes).reshape(-1, 4, 2)
    center = points.mean(1)
    corners = points - center.unsqueeze(1)
    return _Quads(center, corners, _signed_area(corners).abs())


def _sorted_nms(
    dets: Tensor,
    order: Tensor,
    iou_threshold: float,
    multi_label: bool,
    columns: int,
    convert: Callable[[Tensor], _Quads],
) -> Tensor:
    with kernel_mode(dets):
        quads = convert(dets[:, :columns])
        labels = dets[:, columns] if multi_label else None
        alive = torch.ones(len(dets), dtype=torch.bool)
        kept = []
        for start in range(0, len(dets), _NMS_BLOCK):
            rows = start + alive[start : start + _NMS_BLOCK].nonzero().flatten()
            block = rows.to(dets.device)
            covers = _overlap(quads[block], quads[start:], _IOU, False) > iou_threshold
            if labels is not None:
                covers &= labels[block].unsqueeze(1) == labels[start:]
            for row, covered in zip(rows.tolist(), covers.cpu()):
                if alive[row]:
                    kept.append(row)
                    alive[start:] &= ~covered
        return order[torch.tensor(kept, dtype=torch.long, device=order.device)]


def _overlap(first: _Quads, second: _Quads, mode: int, aligned: bool) -> Tensor:
    if aligned:
        return _paired_overlap(first, second, mode)
    result = first.area.new_zeros(len(first.area), len(second.area))
    step = chunk_length(8 * len(second.area))
    for start in range(0, len(first.area), step):
        near = _boxes_touch(first[slice(start, start + step)], second)
        rows, columns = near.nonzero(as_tuple=True)
        rows = rows + start
        result[rows, columns] = _paired_overlap(first[rows], second[columns], mode)
    return result


def _boxes_touch(first: _Quads, second: _Quads) -> Tensor:
    """(M, N) mask of the pairs whose upright bounding boxes meet; the others need no clipping."""
    (low1, high1), (low2, high2) = _bounds(first), _bounds(second)
    return ((low1.unsqueeze(1) <= high2) & (low2 <= high1.unsqueeze(1))).all(-1)


def _bounds(quads: _Quads) -> tuple[Tensor, Tensor]:
    return quads.center + quads.corners.amin(1), quads.center + quads.corners.amax(1)


def _paired_overlap(first: _Quads, second: _Quads, mode: int) -> Tensor:
    result = torch.empty_like(first.area)
    step = chunk_length(_CLIPPED_ELEMENTS)
    for start in range(0, len(result), step):
        part = slice(start, start + step)
        result[part] = _clipped_overlap(first[part], second[part], mode)
    return result


def _clipped_overlap(first: _Quads, second: _Quads, mode: int) -> Tensor:
    # Working around the second centre keeps precision for boxes far from the origin (batched NMS shifts them there).
    subject = first.corners + (first.center - second.center).unsqueeze(1)
    window = second.corners
    window = torch.where((_signed_area(window) < 0)[:, None, None], window.flip(1), window)
    for side in range(4):
        subject = _clip(subject, window[:, side], window[:, (side + 1) % 4])
    shared = torch.minimum(_signed_area(subject).abs(), torch.minimum(first.area, second.area))
    whole = first.area + second.area - shared if mode == _IOU else first.area
    solid = (first.area >= _MIN_AREA) & (second.area >= _MIN_AREA)
    return torch.where(solid, shared / whole, 0.0)


def _clip(polygon: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Polygons (P, V, 2) cut to the left of the lines ``start`` to ``end`` (P, 2): (P, 2 * V, 2).

    A vertex outside is dropped onto the line instead of being removed: what then runs along the line encloses no
    area, and every polygon keeps the same number of vertices.
    """
    edge = end - start
    edge = edge / edge.norm(dim=1, keepdim=True).clamp(min=torch.finfo(edge.dtype).tiny)
    inward = torch.stack([-edge[:, 1], edge[:, 0]], 1).unsqueeze(1)
    depth = ((polygon - start.unsqueeze(1)) * inward).sum(-1, keepdim=True)
    dropped = polygon - depth.clamp(max=0) * inward
    following, next_depth = polygon.roll(-1, 1), depth.roll(-1, 1)
    crosses = (depth > 0) != (next_depth > 0)
    share = depth / torch.where(crosses, depth - next_depth, 1.0)
    crossing = torch.where(crosses, polygon + share * (following - polygon), dropped)
    return torch.stack([dropped, crossing], 2).flatten(1, 2)


def _signed_area(polygon: Tensor) -> Tensor:
    following = polygon.roll(-1, 1)
    return (polygon[..., 0] * following[..., 1] - polygon[..., 1] * following[..., 0]).sum(-1) / 2
