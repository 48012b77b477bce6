"""CARAFE upsampling and FIR resampling."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ._common import kernel_mode, wide

__all__ = [
    "carafe_backward",
    "carafe_forward",
    "carafe_naive_backward",
    "carafe_naive_forward",
    "upfirdn2d",
]


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """Fill ``output`` (N, C, s * H, s * W) (contract of ``mmcv.ops.carafe_naive``), s being ``scale_factor``.

    ``features`` (N, C, H, W); ``masks`` (N, group_size * kernel_size^2, s * H, s * W) holds for every output pixel
    the weights of the ``kernel_size`` square of input pixels around it.
    """
    with kernel_mode(features):
        source, weights = _grouped(features, masks, kernel_size, group_size, scale_factor)
        total = torch.zeros_like(_blocks(wide(output), group_size, scale_factor))
        for tap, rows, columns in _taps(kernel_size, features):
            total.addcmul_(source[..., rows, columns][..., :, None, :, None], weights[:, :, tap, None])
        output.copy_(total.view_as(output))


def carafe_naive_backward(
    top_grad: Tensor,
    features: Tensor,
    masks: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Fill ``bottom_grad`` (as ``features``) and ``mask_grad`` (as ``masks``)."""
    with kernel_mode(features):
        source, weights = _grouped(features, masks, kernel_size, group_size, scale_factor)
        grad = _blocks(wide(top_grad).contiguous(), group_size, scale_factor)
        to_source, to_weights = torch.zeros_like(source), torch.zeros_like(weights)
        for tap, rows, columns in _taps(kernel_size, features):
            window = source[..., rows, columns][..., :, None, :, None]
            to_weights[:, :, tap] = (window * grad).sum(2)
            to_source[..., rows, columns] += (weights[:, :, tap, None] * grad).sum((4, 6))
        margin = kernel_size // 2
        height, width = features.shape[-2:]
        inner = to_source[..., margin : margin + height, margin : margin + width]
        bottom_grad.copy_(inner.reshape(bottom_grad.shape))
        mask_grad.copy_(to_weights.view_as(mask_grad))


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """As :func:`carafe_naive_forward` (contract of ``mmcv.ops.carafe``).

    ``rfeatures`` keeps the features for the backward, which gets nothing else; the other buffers stay unused.
    """
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    top_grad: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rtop_grad: Tensor,
    rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor,
    rmask_grad: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Fill ``bottom_grad`` and ``mask_grad``; ``rfeatures`` is what :func:`carafe_forward` left there."""
    carafe_naive_backward(top_grad, rfeatures, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor)


def upfirdn2d(
    input: Tensor,
    filter: Tensor,
    upx: int,
    upy: int,
    downx: int,
    downy: int,
    padx0: int,
    padx1: int,
    pady0: int,
    pady1: int,
    flip: bool,
    gain: float,
) -> Tensor:
    """Zero insertion, padding (negative crops), FIR filter and decimation (contract of ``mmcv.ops.upfirdn2d``).

    ``input`` (N, C, H, W), ``filter`` (FH, FW). ``flip`` False convolves, True correlates; the result, in the
    dtype of ``input``, is scaled by ``gain``.
    """
    with kernel_mode(input):
        images, channels, height, width = input.shape
        spread = wide(input).new_zeros(images * channels, 1, height * upy, width * upx)
        spread[:, :, ::upy, ::upx] = wide(input).reshape(-1, 1, height, width)
        padded = F.pad(spread, (padx0, padx1, pady0, pady1))
        taps = filter.to(padded.dtype) * gain
        taps = taps if flip else taps.flip(0, 1)
        result = F.conv2d(padded, taps[None, None], stride=(downy, downx))
        return result.view(images, channels, *result.shape[-2:]).to(input.dtype)


def _grouped(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale: int) -> tuple[Tensor, Tensor]:
    """Padded features (N, G, C / G, H', W') and weights (N, G, taps, H, s, W, s)."""
    padded = F.pad(wide(features), [kernel_size // 2] * 4)
    height, width = features.shape[-2:]
    weights = wide(masks).reshape(len(masks), group_size, kernel_size**2, height, scale, width, scale)
    return padded.unflatten(1, (group_size, -1)), weights


def _blocks(image: Tensor, group_size: int, scale: int) -> Tensor:
    """(N, C, s * H, s * W) as (N, G, C / G, H, s, W, s)."""
    grouped = image.unflatten(1, (group_size, -1))
    return grouped.unflatten(4, (-1, scale)).unflatten(3, (-1, scale))


def _taps(kernel_size: int, features: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Number of every kernel tap and the window of the padded features that it meets."""
    height, width = features.shape[-2:]
    for tap in range(kernel_size**2):
        row, column = divmod(tap, kernel_size)
        yield tap, slice(row, row + height), slice(column, column + width)
