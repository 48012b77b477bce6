"""Lists with one entry per image, as mmdet hands them over, as padded tensors; the host never waits for the device."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from mmdet.structures.bbox import get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor

from ..upload import upload


class Objects(NamedTuple):
    """The annotated objects of a batch, as many places per image as the fullest image needs, and at least one."""

    boxes: Tensor  # [B, G, 4], zeros where there is no object
    labels: Tensor  # [B, G]
    valid: Tensor  # [B, G]


def pad_objects(instances: list[InstanceData]) -> Objects:
    """The `bboxes` [n, 4] and `labels` [n] of every image, padded."""
    boxes = [get_box_tensor(image.bboxes) for image in instances]
    rows, valid = _places([len(image) for image in boxes], boxes[0].device)
    return Objects(_fill(boxes, rows), _fill([image.labels for image in instances], rows), valid)


def pad_boxes(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Boxes [n, 4] of every image as one tensor [B, G, 4], zeros behind the last, and which are boxes [B, G]."""
    rows, valid = _places([len(image) for image in images], images[0].device)
    return _fill(images, rows), valid


def pad_ignored(instances: list[InstanceData | None] | None) -> Tensor | None:
    """Boxes [B, I, 4] to be ignored, zeros behind the last; None where no image has one."""
    known = [image for image in instances or () if image is not None and len(image.bboxes)]
    if not known:
        return None
    like = get_box_tensor(known[0].bboxes)
    return pad_boxes([like[:0] if image is None else get_box_tensor(image.bboxes) for image in instances])[0]


def image_groups(costs: Sequence[int], budget: int) -> list[slice]:
    """Consecutive images whose costs add up to `budget` at most; an image that costs more is alone."""
    groups, start, total = [], 0, 0
    for image, cost in enumerate(costs):
        if image > start and total + cost > budget:
            groups.append(slice(start, image))
            start, total = image, 0
        total += cost
    return [*groups, slice(start, len(costs))]


def take(rows: Tensor, index: Tensor) -> Tensor:
    """The rows `index` [B, K] of every image: [B, N] or [B, N, C] -> [B, K] or [B, K, C]."""
    if rows.dim() == 2:
        return rows.gather(1, index)
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.size(-1)))


def _places(counts: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows [B, G] of each image's entries in the concatenation of all images, one past its end for padding."""
    total, width = sum(counts), max(1, *counts)
    rows = [[*range(end - count, end), *[total] * (width - count)] for count, end in zip(counts, accumulate(counts))]
    places = upload(rows, device, torch.long)
    return places, places < total


def _fill(images: list[Tensor], rows: Tensor) -> Tensor:
    return torch.cat([*images, images[0].new_zeros(1, *images[0].shape[1:])])[rows]
