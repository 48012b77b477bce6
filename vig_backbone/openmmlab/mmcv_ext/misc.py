"""Masked convolution, fused bias and leaky ReLU, and what mmcv reports about its build."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from ._common import kernel_mode, wide

__all__ = [
    "fused_bias_leakyrelu",
    "get_compiler_version",
    "get_compiling_cuda_version",
    "masked_col2im_forward",
    "masked_im2col_forward",
]

_LEAKY_RELU = 3


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Fill ``col`` (C * kernel_h * kernel_w, M) with the patches at M pixels (contract of ``mmcv.ops.masked_conv2d``).

    ``im`` (1, C, H, W); ``mask_h_idx`` and ``mask_w_idx`` (M,) are output pixels of a stride-1 convolution.
    """
    with kernel_mode(im):
        padded = F.pad(im[0], (pad_w, pad_w, pad_h, pad_h))
        rows = mask_h_idx + torch.arange(kernel_h, device=im.device)[:, None]
        columns = mask_w_idx + torch.arange(kernel_w, device=im.device)[:, None]
        col.copy_(padded[:, rows[:, None], columns[None]].reshape(col.shape))


def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """Write ``col`` (C, M) to the pixels (mask_h_idx, mask_w_idx) of ``im`` (1, C, height, width)."""
    with kernel_mode(im):
        im[0, :, mask_h_idx, mask_w_idx] = col.to(im.dtype)


def fused_bias_leakyrelu(
    input: Tensor, bias: Tensor, refer: Tensor, act: int, grad: int, alpha: float, scale: float
) -> Tensor:
    """Bias, activation and scale in one (contract of ``mmcv.ops.fused_bias_leakyrelu``).

    ``input`` (N, C, ...); ``bias`` (C,) or empty. ``act`` 1 is linear, 3 leaky ReLU of slope ``alpha``. ``grad`` 0
    is the value, 1 the first derivative (its sign taken from ``refer``, shaped as ``input``), 2 the second: zero.
    Raises ``ValueError`` for another ``act`` or ``grad``.
    """
    if act not in (1, _LEAKY_RELU) or grad not in (0, 1, 2):
        raise ValueError(f"fused_bias_leakyrelu knows act 1 or 3 and grad 0 to 2, got act {act}, grad {grad}")
    with kernel_mode(input):
        value = wide(input)
        if bias.numel():
            value = value + bias.to(value.dtype).view(-1, *[1] * (input.dim() - 2))
        if grad == 2:
            value = torch.zeros_like(value)
        elif act == _LEAKY_RELU:
            sign = refer if grad else value
            value = torch.where(sign > 0, value, value * alpha)
        return (value * scale).to(input.dtype)


def get_compiler_version() -> str:
    """What stands where a compiled mmcv names its compiler."""
    return f"none (mmcv operators served by torchvision {torchvision.__version__} and torch {torch.__version__})"


def get_compiling_cuda_version() -> str:
    """CUDA version of the torch build that runs the operators, or that there is none."""
    return torch.version.cuda or "not available"
