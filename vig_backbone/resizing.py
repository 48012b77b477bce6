"""Resizing one map to as many grids as there are images in a batch, on the device."""

import torch
from torch import Tensor
from vig_kernels.arguments import without_autocast

CUBIC = -0.75  # the parameter of PyTorch's bicubic kernel


def resize_bicubic(x: Tensor, sizes: Tensor, size: tuple[int, int]) -> Tensor:
    """A map [1, h, w, C], resized for each image and put into the upper left corner of a larger one: [B, H, W, C].

    Args:
        sizes: rows and columns for each image, ``[B, 2]``, integers; nothing waits for their values.
        size: H and W, at least as large; the rest is zeros.

    Returns:
        In the corner of image b what ``F.interpolate(.., sizes[b], mode="bicubic", align_corners=False)`` gives.
    """
    _, h, w, C = x.shape
    with without_autocast(x):
        rows = _bicubic_weights(sizes[:, 0], size[0], h, x.dtype) @ x.reshape(h, w * C)  # [B, H, w C]
        columns = _bicubic_weights(sizes[:, 1], size[1], w, x.dtype)[:, None]  # [B, 1, W, w]
        return columns @ rows.unflatten(-1, (w, C))


def _bicubic_weights(sizes: Tensor, length: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """What each of `inputs` numbers counts for in each of sizes[b] outputs: [B, length, inputs], zeros behind."""
    places = torch.arange(length, device=sizes.device)
    source = (places + 0.5) * (inputs / sizes[:, None].to(dtype)) - 0.5  # [B, length]
    first = source.floor()
    offset = source - first
    near = torch.stack((offset, 1 - offset), -1)
    near = ((CUBIC + 2) * near - (CUBIC + 3)) * near.square() + 1
    far = torch.stack((offset + 1, 2 - offset), -1)
    far = ((CUBIC * far - 5 * CUBIC) * far + 8 * CUBIC) * far - 4 * CUBIC
    taps = torch.stack((far[..., 0], near[..., 0], near[..., 1], far[..., 1]), -1)  # [B, length, 4]
    taps = taps * (places < sizes[:, None])[..., None]
    index = first.long()[..., None] + torch.arange(-1, 3, device=sizes.device)
    weights = taps.new_zeros(len(sizes), length, inputs)
    return weights.scatter_add(-1, index.clamp(0, inputs - 1), taps)
