"""mmdet's MaxIoUAssigner for all images at once."""

import torch
from mmdet.models.task_modules.assigners import BboxOverlaps2D, MaxIoUAssigner
from torch import Tensor

from ..errors import ConfigError
from .batch import Objects, image_groups
from .boxes import pairwise_overlap

# Entries of the table objects x boxes held at a time, 128 MB in float32; about five such tables live at once.
TABLE_ENTRIES = 1 << 25
NOTHING = -1.0  # the overlap of pairs that do not count


class BatchedAssigner:
    """Which object each box belongs to, by the thresholds of a MaxIoUAssigner.

    Equal to it for equal boxes. `gpu_assign_thr` has no effect: the tables are bounded by taking few images at a time.

    Args:
        assigner: the assigner that mmdet built.
        stock: the class to name where the assigner is one that this one cannot replace.

    Raises:
        ConfigError: the assigner is of another class, or has an option that is not supported.
    """

    def __init__(self, assigner: MaxIoUAssigner, stock: str) -> None:
        _check(assigner, stock)
        self.rule = assigner
        low = assigner.neg_iou_thr
        self.background = (0.0, low) if isinstance(low, float) else low

    @torch.no_grad()
    def __call__(self, boxes: Tensor, valid: Tensor, objects: Objects, ignored: Tensor | None) -> Tensor:
        """Returns [B, N]: the object's number from 1, 0 for background, -1 for neither and where not valid.

        Args:
            boxes: [B, N, 4], or [N, 4] for the same boxes in every image.
            valid: [B, N], the boxes that take part.
            objects: the annotated objects.
            ignored: boxes [B, I, 4] of regions to leave out, or None.
        """
        boxes = boxes.expand(len(valid), -1, -1)
        if self.rule.ignore_iof_thr <= 0:
            ignored = None
        costs = [objects.boxes.size(1) * boxes.size(1)] * len(valid)
        parts = [
            self._assign(boxes[part], valid[part], Objects(*(t[part] for t in objects)), _part(ignored, part))
            for part in image_groups(costs, TABLE_ENTRIES)
        ]
        return torch.cat(parts)

    def _assign(self, boxes: Tensor, valid: Tensor, objects: Objects, ignored: Tensor | None) -> Tensor:
        overlaps = pairwise_overlap(objects.boxes, boxes)  # [B, G, N]
        out = ~valid if ignored is None else ~valid | self._lies_in(boxes, ignored)
        overlaps = overlaps.masked_fill_(out.unsqueeze(1), NOTHING).masked_fill_(~objects.valid.unsqueeze(2), NOTHING)
        best, nearest = overlaps.max(1)  # [B, N]
        low, high = self.background
        # An image without objects is background everywhere, its ignored regions included.
        background = ((best >= low) & (best < high)) | ~objects.valid.any(1, keepdim=True)
        assigned = torch.where(best >= self.rule.pos_iou_thr, nearest + 1, background.long() - 1)
        if self.rule.match_low_quality:
            forced = self._best_for_an_object(overlaps)
            assigned = torch.where(forced > 0, forced, assigned)
        return assigned.masked_fill_(~valid, -1)

    def _lies_in(self, boxes: Tensor, ignored: Tensor) -> Tensor:
        if self.rule.ignore_wrt_candidates:
            inside = pairwise_overlap(boxes, ignored, of_first=True).amax(2)
        else:
            inside = pairwise_overlap(ignored, boxes, of_first=True).amax(1)
        return inside > self.rule.ignore_iof_thr

    def _best_for_an_object(self, overlaps: Tensor) -> Tensor:
        """[B, N]: number from 1 of the last object that no box overlaps more than this one does, 0 for none."""
        most, place = overlaps.max(2, keepdim=True)  # [B, G, 1]
        eligible = most >= max(self.rule.min_pos_iou, 0)  # places without an object have NOTHING everywhere
        if self.rule.gt_max_assign_all:
            matched = overlaps == most
        else:
            matched = torch.arange(overlaps.size(2), device=place.device) == place
        numbers = torch.arange(1, overlaps.size(1) + 1, device=place.device, dtype=torch.int32).unsqueeze(1)
        return ((matched & eligible) * numbers).amax(1).long()


def _part(tensor: Tensor | None, images: slice) -> Tensor | None:
    return None if tensor is None else tensor[images]


def _check(assigner: MaxIoUAssigner, stock: str) -> None:
    if type(assigner) is not MaxIoUAssigner:
        raise ConfigError(f"train_cfg.assigner must be a MaxIoUAssigner, not {type(assigner).__name__}; use {stock}")
    calculator = assigner.iou_calculator
    if type(calculator) is not BboxOverlaps2D or calculator.dtype is not None:
        raise ConfigError(f"train_cfg.assigner.iou_calculator must be BboxOverlaps2D without dtype; else use {stock}")
    if assigner.perm_repeat_gt_cfg is not None:
        raise ConfigError(f"train_cfg.assigner.perm_repeat_gt_cfg is not supported; leave it out or use {stock}")
    if not isinstance(assigner.neg_iou_thr, (float, tuple)):
        raise ConfigError(
            f"train_cfg.assigner.neg_iou_thr must be a float or a pair of them, got {assigner.neg_iou_thr!r}"
        )
