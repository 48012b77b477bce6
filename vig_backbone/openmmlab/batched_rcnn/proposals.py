"""Proposals of all images in one tensor, and the non-maximum suppression that finds them."""

from collections.abc import Sequence
from functools import cached_property

import torch
from mmdet.structures.bbox import get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor
from torchvision.ops import nms
from vig_kernels import grouped_nms
from vig_kernels.arguments import triton_runs_on

from .batch import pad_boxes, take


class Proposals(Sequence[InstanceData]):
    """The best boxes of every image, padded; also the list of InstanceData that mmdet's heads expect.

    Reading it as a list waits for the device once, to learn how many boxes each image has.

    Args:
        boxes: [B, P, 4].
        scores: [B, P].
        valid: [B, P], the places in use: the first ones of each image.
    """

    def __init__(self, boxes: Tensor, scores: Tensor, valid: Tensor) -> None:
        self.boxes, self.scores, self.valid = boxes, scores, valid

    @classmethod
    def of(cls, proposals: Sequence[InstanceData]) -> "Proposals":
        """`proposals` of any RPN, or of a file; the scores of others than this class are left out."""
        if isinstance(proposals, cls):
            return proposals
        boxes, valid = pad_boxes([get_box_tensor(image.bboxes) for image in proposals])
        return cls(boxes, torch.zeros_like(boxes[..., 0]), valid)

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, image: int | slice) -> InstanceData | list[InstanceData]:
        return self._instances[image]

    @cached_property
    def _instances(self) -> list[InstanceData]:
        counts = self.valid.sum(1).tolist()
        return [
            InstanceData(bboxes=boxes[:n], scores=scores[:n], labels=torch.zeros_like(scores[:n], dtype=torch.long))
            for boxes, scores, n in zip(self.boxes, self.scores, counts)
        ]


def best_boxes(
    boxes: Tensor, scores: Tensor, counts: Sequence[int], valid: Tensor, iou_threshold: float, limit: int
) -> Proposals:
    """The `limit` best boxes per image after suppression within each level, best first, as mmcv's `batched_nms`.

    On GPUs that run it, all levels of all images at a time, and nobody waits; elsewhere image by image in torchvision.

    Args:
        boxes: [B, M, 4], level by level, within a level best first.
        scores: [B, M], not negative.
        counts: boxes of each level; M in all.
        valid: [B, M], the boxes that take part.
        iou_threshold: a box goes when it overlaps a better one by more.
        limit: boxes kept per image.
    """
    if triton_runs_on(boxes):
        kept = grouped_nms(boxes, valid, counts, iou_threshold)
    else:
        kept = _nms_of_each_image(boxes, scores, counts, valid, iou_threshold)
    # Stable: of equal scores the first comes first.
    ranked, order = scores.masked_fill(~kept, -1).sort(dim=1, descending=True, stable=True)
    chosen = order[:, :limit]
    return Proposals(take(boxes, chosen), take(scores, chosen), ranked[:, :limit] >= 0)


def _nms_of_each_image(
    boxes: Tensor, scores: Tensor, counts: Sequence[int], valid: Tensor, iou_threshold: float
) -> Tensor:
    """Which boxes are left, [B, M]. As in mmcv, the levels of an image are moved apart; boxes out of it come last."""
    kept = torch.zeros_like(valid)
    levels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(boxes.device)
    reach = boxes.masked_fill(~valid.unsqueeze(-1), 0).amax((1, 2)) + 1  # [B]
    spread = boxes + (levels * reach[:, None]).unsqueeze(-1)
    for image, ranks in enumerate(scores.masked_fill(~valid, -1)):
        kept[image, nms(spread[image], ranks, iou_threshold)] = True
    return kept & valid
