"""Launches of the loss's Triton kernels."""

import math

import torch
from torch import Tensor

from ..launch import ceil_div, check_input, with_unit_stride
from ..online_softmax import class_tile
from ..plans import Plan, call
from . import triton_kernels as kernels

# Classes and pixels of a program's tile, and its warps.
FORWARD = (2, 128, 1)
BACKWARD = (8, 32, 1)


def forward(logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, hits, and logsumexp of all pixels, each ``[B, H, W]``: one kernel.

    Raises:
        TypeError: for float64.
        RuntimeError: for tensors that are not on a GPU, outside of Triton's interpreter.
    """
    check_input(logits, "chunk")
    inputs = *with_unit_stride(logits), labels.contiguous()
    return tuple(call(_record_forward, inputs, ignore_index, align_corners))


def backward(
    logits: Tensor, labels: Tensor, norm: Tensor, grad_loss: Tensor, ignore_index: int, align_corners: bool
) -> Tensor:
    """The gradient of the logits: one kernel. That of the loss may be one number for all pixels, expanded."""
    inputs = *with_unit_stride(logits), labels.contiguous(), norm, grad_loss
    return call(_record_backward, inputs, ignore_index, align_corners)[0]


def _scale(size: int, target: int, align_corners: bool) -> float:
    """Sources per pixel."""
    if not align_corners:
        return size / target
    return (size - 1) / (target - 1) if target > 1 else 0.0


def _steps(scale: float, target: int) -> int:
    """Pixels, at most, within less than a source's distance from one; a weight of rounding's size may be left out."""
    return min(target, math.ceil(2 / scale - 1e-3)) if scale else target


def _record_forward(
    plan: Plan, logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (_, C, h, w), (B, H, W) = logits.shape, labels.shape
    loss, norm = plan.empty(B, H, W, dtype=torch.float32), plan.empty(B, H, W, dtype=torch.float32)
    hits = plan.empty(B, H, W, dtype=torch.bool)
    scales = [_scale(*sizes, align_corners) for sizes in ((h, H), (w, W))]
    tile = class_tile(C, W, FORWARD)
    plan.launch(
        kernels.forward, (B * H * ceil_div(W, tile["BX"]),),
        logits, labels, loss, hits, norm, *logits.stride()[:3], h, w, H, W, *scales, ignore_index,
        ALIGN=align_corners, **tile,
    )  # fmt: skip
    return loss, hits, norm


def _record_backward(
    plan: Plan, logits: Tensor, labels: Tensor, norm: Tensor, grad_loss: Tensor, ignore_index: int, align_corners: bool
) -> tuple[Tensor]:
    (_, C, h, w), (B, H, W) = logits.shape, labels.shape
    grad = plan.empty(B, C, h, w, dtype=logits.dtype)
    scales = [_scale(*sizes, align_corners) for sizes in ((h, H), (w, W))]
    stretches = [1 / scale if scale else 1.0 for scale in scales]  # else all pixels lie upon source 0
    steps = [_steps(scale, target) for scale, target in zip(scales, (H, W))]
    tile = class_tile(C, w, BACKWARD)
    plan.launch(
        kernels.backward, (ceil_div(C, tile["BC"]) * ceil_div(w, tile["BX"]), B * h),
        logits, labels, norm, grad_loss, grad, *logits.stride()[:3], *grad_loss.stride(), h, w, H, W,
        *scales, *stretches, *steps, ignore_index, ALIGN=align_corners, **tile,
    )  # fmt: skip
    return (grad,)
