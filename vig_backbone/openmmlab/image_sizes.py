"""What data preprocessors do so that no image is told from its padding by accident: they send its size along."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..padding import attach_valid_sizes
from .upload import upload

Size = tuple[int, int]


def image_sizes(images: Tensor | Sequence[Tensor]) -> list[Size]:
    """Height and width of each image [C, H, W], in a list or as a batch [B, C, H, W]."""
    return [tuple(image.shape[-2:]) for image in images]


def attach_sizes(batch: Tensor, sizes: Sequence[Size]) -> None:
    """Give a batch [B, C, H, W] the sizes of its images along, if any of them is padded; see `vig_backbone.padding`."""
    padded = any(tuple(size) != batch.shape[-2:] for size in sizes)
    attach_valid_sizes(batch, upload(sizes, batch.device, torch.long) if padded else None)
