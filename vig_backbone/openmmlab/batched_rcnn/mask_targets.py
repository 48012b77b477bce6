"""Mask targets of all images from masks that lie on the device."""

from itertools import accumulate

import torch
from mmdet.structures.mask import BaseInstanceMasks, BitmapMasks, mask_target
from mmengine.config import ConfigDict
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.utils import _pair
from torchvision.ops import roi_align

from ..tensor_masks import TensorMasks
from ..upload import upload
from .batch import image_groups

# Pixels of masks in float32 at a time, 1 GB: 250 masks of 800 x 1344.
PIXELS_AT_ONCE = 1 << 28


def batched_mask_target(
    masks: list[BaseInstanceMasks], rois: Tensor, matched: Tensor, counts: list[int], cfg: ConfigDict
) -> Tensor:
    """Targets [K, h, w] in float32 for K RoIs: mmdet's `mask_target`, in one RoIAlign for many images.

    Args:
        masks: of every image; TensorMasks are used where they lie, BitmapMasks copied to the device. Where an image
            has polygons, mmdet itself crops them, image by image on the host.
        rois: [K, 5] (image, x1, y1, x2, y2), those of the first image first.
        matched: [K], the mask of its image that each RoI is for.
        counts: RoIs of each image; K in all.
        cfg: `mask_size` of the targets, and `soft_mask_target` to keep fractions.
    """
    if not sum(counts):
        return rois.new_zeros(0, *_pair(cfg.mask_size))
    bitmaps = [_bitmaps(image, rois.device) for image in masks]
    if any(image is None for image in bitmaps):
        return mask_target(list(rois[:, 1:].split(counts)), list(matched.split(counts)), masks, cfg)
    ends = [0, *accumulate(counts)]
    parts = []
    for group in image_groups([image.numel() for image in bitmaps], PIXELS_AT_ONCE):
        part = slice(ends[group.start], ends[group.stop])
        if part.start < part.stop:  # else there may be no mask either
            image = rois[part, 0].long() - group.start
            parts.append(_crop(bitmaps[group], image, rois[part, 1:], matched[part], cfg))
    return torch.cat(parts)


def _bitmaps(masks: BaseInstanceMasks, device: torch.device) -> Tensor | None:
    """Masks [n, H, W] on `device`; None if they are not bitmaps."""
    if isinstance(masks, BitmapMasks):
        return torch.from_numpy(masks.masks).to(device)
    return masks.data.to(device) if isinstance(masks, TensorMasks) else None


def _crop(bitmaps: list[Tensor], image: Tensor, boxes: Tensor, matched: Tensor, cfg: ConfigDict) -> Tensor:
    starts = [0, *accumulate(len(masks) for masks in bitmaps)]
    # Per image: where its masks start, and its width and height, to which the boxes are clipped.
    places = [[start, *masks.shape[:0:-1]] for start, masks in zip(starts, bitmaps)]
    places = upload(places, boxes.device, torch.float32)[image]  # [K, 3]
    clipped = torch.minimum(boxes.clamp(min=0), places[:, 1:].repeat(1, 2))
    rois = torch.cat((places[:, :1] + matched[:, None], clipped), 1)
    targets = roi_align(_stack(bitmaps).unsqueeze(1), rois, _pair(cfg.mask_size), aligned=True).squeeze(1)
    return targets if cfg.get("soft_mask_target", False) else (targets >= 0.5).float()


def _stack(bitmaps: list[Tensor]) -> Tensor:
    """All masks in float32, smaller images continued to the right and downwards by their last pixels.

    RoIAlign repeats the last pixel at the border of a map, and samples less than half a pixel beyond it; continued
    images give the same.
    """
    height, width = (max(size) for size in zip(*(masks.shape[1:] for masks in bitmaps)))
    continued = []
    for masks in bitmaps:
        right, down = width - masks.size(2), height - masks.size(1)
        if not len(masks):
            continue
        if right or down:
            masks = F.pad(masks[:, None].float(), (0, right, 0, down), mode="replicate").squeeze(1)
        continued.append(masks)
    return torch.cat(continued).float()
