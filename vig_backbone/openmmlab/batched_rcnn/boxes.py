"""Arithmetic of boxes (x1, y1, x2, y2) with any leading dimensions, step for step that of mmdet."""

import math

import torch
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from torch import Tensor, nn

_SMALLEST_AREA = 1e-6  # the eps of mmdet's bbox_overlaps
_LARGEST_GROWTH = abs(math.log(16 / 1000))  # the wh_ratio_clip of mmdet's coder


def pairwise_overlap(first: Tensor, second: Tensor, of_first: bool = False) -> Tensor:
    """Intersection over union, or over the area of `first`: [..., M, 4] and [..., N, 4] -> [..., M, N].

    The numbers of mmdet's `bbox_overlaps`, in a third of its memory.
    """
    x1, y1, x2, y2 = first.unsqueeze(-2).unbind(-1)  # [..., M, 1] each
    u1, v1, u2, v2 = second.unsqueeze(-3).unbind(-1)  # [..., 1, N] each
    shared = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp_(min=0)
    shared *= (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp_(min=0)
    area = (x2 - x1) * (y2 - y1)
    whole = area if of_first else area + (u2 - u1) * (v2 - v1) - shared
    return shared.div_(whole.clamp(min=_SMALLEST_AREA))


class BoxDeltas(nn.Module):
    """mmdet's DeltaXYWHBBoxCoder for whole batches, its means and deviations on the device for good.

    The stock coder copies both from the host in every call, which waits for the device, and clips one image at a time.
    """

    def __init__(self, coder: DeltaXYWHBBoxCoder) -> None:
        super().__init__()
        # Not persistent: the state dict stays that of the stock head.
        self.register_buffer("means", torch.tensor(coder.means, dtype=torch.float32), persistent=False)
        self.register_buffer("deviations", torch.tensor(coder.stds, dtype=torch.float32), persistent=False)
        self.clip_border = coder.clip_border
        self.largest_shift = coder.ctr_clamp if coder.add_ctr_clamp else None

    def encode(self, boxes: Tensor, targets: Tensor) -> Tensor:
        """Deltas [..., 4] that turn `boxes` into `targets`; not finite where one of them has no area."""
        (centre, size), (goal, goal_size) = _centre_and_size(boxes.float()), _centre_and_size(targets.float())
        deltas = torch.cat(((goal - centre) / size, torch.log(goal_size / size)), -1)
        return (deltas - self.means) / self.deviations

    def decode(self, boxes: Tensor, deltas: Tensor, limits: Tensor | None = None) -> Tensor:
        """Boxes [..., 4] in float32, clipped to 0 ... `limits` (W, H, W, H; any shape that broadcasts) where given."""
        deltas = deltas.float() * self.deviations + self.means
        (centre, size), shift, growth = _centre_and_size(boxes), deltas[..., :2], deltas[..., 2:]
        shift, smallest = size * shift, -_LARGEST_GROWTH
        if self.largest_shift is not None:
            shift, smallest = shift.clamp(-self.largest_shift, self.largest_shift), None
        centre, half = centre + shift, size * growth.clamp(smallest, _LARGEST_GROWTH).exp() * 0.5
        decoded = torch.cat((centre - half, centre + half), -1)
        return torch.minimum(decoded.clamp(min=0), limits) if limits is not None and self.clip_border else decoded


def _centre_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return (boxes[..., :2] + boxes[..., 2:]) * 0.5, boxes[..., 2:] - boxes[..., :2]
