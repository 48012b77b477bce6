"""Deformable convolution, with and without a modulation mask, through torchvision."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import kernel_mode, wide, wide_dtype

__all__ = [
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
]

# Stride, padding, dilation (each as height, width), weight groups and offset groups, in torchvision's order.
_Geometry = tuple[int, int, int, int, int, int, int, int]


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Fill ``output`` (N, O, OH, OW) (contract of ``mmcv.ops.deform_conv2d``).

    ``input`` (N, C, H, W), ``weight`` (O, C / group, kH, kW), ``offset`` (N, 2 * deformable_group * kH * kW, OH,
    OW) as y, x per kernel point, in pixels. ``columns``, ``ones`` and ``im2col_step`` are not needed.
    """
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    with kernel_mode(input):
        output.copy_(_convolve(input, weight, offset, None, None, geometry))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Fill ``grad_input`` and ``grad_offset``; arguments as in :func:`deform_conv_forward`."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    with kernel_mode(input):
        to_input, _, to_offset, _, _ = _convolve_backward(grad_output, input, weight, offset, None, geometry)
        grad_input.copy_(to_input)
        grad_offset.copy_(to_offset)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add ``scale`` times the weight gradient to ``grad_weight``."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    with kernel_mode(input):
        # The weight gradient does not depend on the weight, which mmcv does not pass here.
        weight = torch.zeros_like(grad_weight)
        to_weight = _convolve_backward(grad_output, input, weight, offset, None, geometry)[1]
        grad_weight.add_(to_weight * scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Fill ``output`` (N, O, OH, OW) (contract of ``mmcv.ops.modulated_deform_conv2d``).

    As :func:`deform_conv_forward`, with ``mask`` (N, deformable_group * kernel_h * kernel_w, OH, OW) scaling every
    sample and ``bias`` (O,) added when ``with_bias``.
    """
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    with kernel_mode(input):
        output.copy_(_convolve(input, weight, offset, mask, bias if with_bias else None, geometry))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Fill the five gradients (``grad_bias`` only when ``with_bias``)."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    with kernel_mode(input):
        found = _convolve_backward(grad_output, input, weight, offset, mask, geometry)
        buffers = (grad_input, grad_weight, grad_offset, grad_mask, grad_bias)
        for buffer, gradient in zip(buffers if with_bias else buffers[:-1], found):
            buffer.copy_(gradient)


def _operands(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, ...]:
    dtype = wide_dtype(input)
    if mask is None:
        mask = input.new_zeros(input.size(0), 1)
    if bias is None:
        bias = input.new_zeros(weight.size(0))
    return tuple(tensor.to(dtype).contiguous() for tensor in (input, weight, offset, mask, bias))


def _convolve(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None, geometry: _Geometry
) -> Tensor:
    operands = _operands(input, weight, offset, mask, bias)
    return torch.ops.torchvision.deform_conv2d(*operands, *geometry, mask is not None)


def _convolve_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, geometry: _Geometry
) -> tuple[Tensor, ...]:
    """Gradients of input, weight, offset, mask and bias."""
    operands = _operands(input, weight, offset, mask, None)
    grad = wide(grad_output).contiguous()
    return torch.ops.torchvision._deform_conv2d_backward(grad, *operands, *geometry, mask is not None)
