"""Batches of images of different sizes: which part of each map is image, and which is padding.

An image lies in the upper left corner of its map. Valid sizes are the rows and columns that it has there, ``[B, 2]``,
integers on the device of the map; at stride s, ``ceil(size / s)``. A data preprocessor gives them to the backbone
along with the images (`attach_valid_sizes`), through whatever detector or segmenter there is in between.
"""

import torch
from torch import Tensor
from vig_kernels.padding import check_valid_sizes, clear_padding_tokens, valid_mask

__all__ = [
    "at_stride",
    "attach_valid_sizes",
    "attached_valid_sizes",
    "check_image_sizes",
    "clear_padding",
    "clear_padding_tokens",
    "valid_mask",
]


def attach_valid_sizes(images: Tensor, valid_sizes: Tensor | None) -> None:
    """Give the images [B, 3, H, W] their valid sizes in pixels along; whatever makes a new tensor of them drops these.

    None for images without padding: the backbone has nothing to look after then.
    """
    images.valid_sizes = valid_sizes


def attached_valid_sizes(images: Tensor) -> Tensor | None:
    """The valid sizes that came along with images, if any."""
    return getattr(images, "valid_sizes", None)


def check_image_sizes(valid_sizes: Tensor, images: Tensor) -> None:
    """Refuse what are not the sizes of images [B, 3, H, W]; values are looked at on a CPU only, where it costs nothing.

    Raises:
        ValueError: saying what they are.
    """
    check_valid_sizes(valid_sizes, "images", images)
    H, W = images.shape[-2:]
    if valid_sizes.device.type == "cpu" and not torch.compiler.is_compiling():
        for h, w in valid_sizes.tolist():
            if not (0 < h <= H and 0 < w <= W):
                raise ValueError(f"valid_sizes: {h}x{w} pixels do not lie in a batch of {H}x{W} pixels")


def at_stride(sizes: Tensor | None, stride: int) -> Tensor | None:
    """The valid sizes of a map that is `stride` times as coarse."""
    return None if sizes is None else (sizes + stride - 1) // stride


def clear_padding(x: Tensor, sizes: Tensor | None, value: float = 0.0) -> Tensor:
    """A map [B, C, H, W] with `value` in its padding; itself where `sizes` is None."""
    if sizes is None:
        return x
    return x.masked_fill(~valid_mask(sizes, *x.shape[-2:])[:, None], value)
