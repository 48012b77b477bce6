"""Images between NumPy and the device, without the copies of the stock transforms and preprocessors."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Number

import cv2
import numpy as np
import torch
from torch import Tensor


def contiguous(image: np.ndarray) -> np.ndarray:
    """The same pixels without gaps; mirrored views, which NumPy copies pixel by pixel, are mirrored by OpenCV.

    image: [H, W] or [H, W, C].
    """
    up, left = image.strides[0] < 0, image.strides[1] < 0
    if image.size and (up or left):
        forward = image[:: -1 if up else 1, :: -1 if left else 1]
        image = cv2.flip(forward, -1 if up and left else 0 if up else 1).reshape(image.shape)
    # NumPy calls a single row contiguous whatever its stride; PyTorch takes no negative one.
    return image if image.flags.c_contiguous and min(image.strides) > 0 else image.copy()


def image_tensor(image: np.ndarray) -> Tensor:
    """[H, W, C] or [H, W] as a view [C, H, W]: channels stay beside each other, the device is quicker to part them."""
    image = contiguous(image)
    return torch.from_numpy(image if image.ndim == 3 else image[..., None]).permute(2, 0, 1)


def padded_stack(images: Sequence[Tensor], divisor: int) -> Tensor:
    """[C, H, W] of any sizes -> [B, C, H, W], zeros below and to the right, sides multiples of `divisor`."""
    H, W = (-(-max(image.shape[i] for image in images) // divisor) * divisor for i in (1, 2))
    if all(image.shape[1:] == (H, W) for image in images):
        return torch.stack(list(images))
    batch = images[0].new_zeros(len(images), images[0].shape[0], H, W)
    for place, image in zip(batch, images):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch


def normalized(
    batch: Tensor,
    sizes: Sequence[tuple[int, int]],
    reverse: bool,
    scale: tuple[Tensor, Tensor] | None,
    pad_value: Number,
) -> Tensor:
    """float32 images of a batch, with the results of the stock preprocessors, which do it image by image.

    Args:
        batch: [B, C, H, W], any type.
        sizes: height and width of each image, below and to the right of which is padding.
        reverse: turn the channels round (BGR to RGB).
        scale: mean and standard deviation, [C, 1, 1] each; None for neither.
        pad_value: of the padding, after normalisation.
    """
    images = (batch.flip(1) if reverse else batch).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if scale:
        images.sub_(scale[0]).div_(scale[1])
    for image, (h, w) in zip(images, sizes):
        if h < batch.shape[2]:
            image[:, h:] = pad_value
        if w < batch.shape[3]:
            image[:, :h, w:] = pad_value
    return images
