"""Proposals of all images in one tensor, and the non-maximum suppression that finds them."""

from collections.abc import Sequence
from functools import cached_property

import torch
from mmdet.structures.bbox import get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor
from torchvision.ops import nms

from .batch import image_groups, pad_boxes


def boxes_at_once(device: torch.device) -> int:
    """How many boxes of several images to suppress together.

    Each suppression waits for a GPU once. Its table of pairs takes a bit each, 200 MB for 40,000 boxes; two images at
    800 x 1344 have 18,000. On the CPU there is nothing to wait for and every pair costs time: image by image.
    """
    return 1 if device.type == "cpu" else 40_000


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
    boxes: Tensor, scores: Tensor, levels: Tensor, valid: Tensor, iou_threshold: float, limit: int
) -> Proposals:
    """The `limit` best boxes per image after suppression within each level, best first.

    mmcv's `batched_nms` for all images together: the boxes of an image are moved apart by level as there, with the
    same rounding, and those of the images in float64, which rounds nothing.

    Args:
        boxes: [B, M, 4].
        scores: [B, M], not negative.
        levels: [M].
        valid: [B, M], the boxes that take part.
        iou_threshold: a box goes when it overlaps a better one by more.
        limit: boxes kept per image.
    """
    B, M = scores.shape
    reach = boxes.masked_fill(~valid.unsqueeze(-1), 0).amax((1, 2)) + 1  # [B]
    spread = (boxes + (levels * reach[:, None]).unsqueeze(-1)).double()
    step = spread.amax() - spread.amin() + 1
    spread = spread + (torch.arange(B, device=boxes.device) * step)[:, None, None]
    # Boxes that do not take part come last and so suppress none.
    ranks = scores.masked_fill(~valid, -1)
    kept = [
        nms(spread[part].flatten(0, 1), ranks[part].flatten().double(), iou_threshold) + part.start * M
        for part in image_groups([M] * B, boxes_at_once(boxes.device))
    ]
    chosen, valid = _first_of_each_image(torch.cat(kept), ranks, limit)
    return Proposals(boxes.flatten(0, 1)[chosen], scores.flatten()[chosen], valid)


def _first_of_each_image(kept: Tensor, ranks: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Rows [B, limit] of the flat boxes in the order of `kept` [K], and which of them are there."""
    B, M = ranks.shape
    limit = min(limit, M)
    image = kept // M
    images = torch.arange(B, device=kept.device)
    mine = (image[:, None] == images) & (ranks.flatten()[kept] >= 0)[:, None]  # [K, B]
    place = mine.cumsum(0).gather(1, image[:, None]).squeeze(1) - 1
    # What is not wanted goes to one place behind all others.
    wanted = mine.any(1) & (place < limit)
    place = torch.where(wanted, image * limit + place, B * limit)
    chosen = kept.new_zeros(B * limit + 1).scatter_(0, place, kept)[:-1].view(B, limit)
    return chosen, torch.arange(limit, device=kept.device) < mine.sum(0)[:, None]
