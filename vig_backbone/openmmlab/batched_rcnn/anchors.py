"""The anchors of all levels in one tensor, and which of them an image may use."""

from collections import OrderedDict
from typing import NamedTuple

import torch
from mmdet.models.task_modules.prior_generators import AnchorGenerator
from torch import Tensor

from ..errors import ConfigError
from ..upload import upload

SIZES_KEPT = 16  # of the feature maps; each takes 6 MB at 800 x 1344


class Anchors(NamedTuple):
    """Anchors of feature maps of certain sizes, all levels in a row."""

    boxes: Tensor  # [A, 4]
    corners: Tensor  # [A, 2], x and y of the upper left corner of the cell that an anchor belongs to, pixels
    counts: list[int]  # per level

    def inside(self, metas: list[dict], border: float) -> Tensor:
        """[B, A]: anchors of cells inside `pad_shape`, at most `border` pixels outside `img_shape` if not negative."""
        sizes = [(*meta["pad_shape"][1::-1], *meta["img_shape"][1::-1]) for meta in metas]
        sizes = upload(sizes, self.boxes.device, torch.float32).unsqueeze(1)  # [B, 1, 4]
        inside = (self.corners < sizes[..., :2]).all(-1)
        if border < 0:
            return inside
        inside &= (self.boxes[:, :2] >= -border).all(-1)
        return inside & (self.boxes[:, 2:] < sizes[..., 2:] + border).all(-1)

    def of_image(self, sizes: Tensor) -> Tensor:
        """[B, A]: anchors of cells that begin inside images of `sizes`, [B, 2], height and width."""
        return (self.corners < sizes.flip(1).unsqueeze(1)).all(-1)


class AnchorCache:
    """Anchors of the feature map sizes seen last.

    Args:
        generator: the generator that mmdet built.
        stock: the class to name where the generator is one that this cannot replace.

    Raises:
        ConfigError: the generator is of another class or makes box objects.
    """

    def __init__(self, generator: AnchorGenerator, stock: str) -> None:
        if type(generator) is not AnchorGenerator or generator.use_box_type:
            raise ConfigError(f"anchor_generator must be an AnchorGenerator without use_box_type; else use {stock}")
        self.generator = generator
        self._kept: OrderedDict[tuple, Anchors] = OrderedDict()

    def __call__(self, maps: list[Tensor]) -> Anchors:
        """The anchors for maps [B, C, H, W] of every level, in float32 whatever the type of the maps."""
        key = (maps[0].device, *(tuple(level.shape[-2:]) for level in maps))
        if key not in self._kept:
            self._kept[key] = self._make(list(key[1:]), key[0])
            if len(self._kept) > SIZES_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _make(self, sizes: list[tuple[int, int]], device: torch.device) -> Anchors:
        levels = self.generator.grid_priors(sizes, device=device)
        corners = []
        for (height, width), (right, down), each in zip(sizes, self.generator.strides, self.generator.num_base_priors):
            y, x = torch.meshgrid(torch.arange(height) * down, torch.arange(width) * right, indexing="ij")
            corners.append(torch.stack((x, y), -1).reshape(-1, 2).repeat_interleave(each, 0))
        corners = torch.cat(corners).to(device, torch.float32)
        return Anchors(torch.cat(levels), corners, [len(level) for level in levels])
