"""The local steps of mmcv's synchronised batch norm; mmcv's Python does the communication between them."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import kernel_mode, wide

__all__ = [
    "sync_bn_backward_data",
    "sync_bn_backward_param",
    "sync_bn_forward_mean",
    "sync_bn_forward_output",
    "sync_bn_forward_var",
]


def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    """Fill ``mean`` (C,) with the mean of ``input`` (N, C, L) on this process (``mmcv.ops.SyncBatchNorm``)."""
    with kernel_mode(input):
        mean.copy_(wide(input).mean((0, 2)))


def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """Fill ``var`` (C,) with the mean square distance of ``input`` (N, C, L) from the global ``mean`` (C,)."""
    with kernel_mode(input):
        var.copy_((wide(input) - mean[:, None]).square().mean((0, 2)))


def sync_bn_forward_output(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    norm: Tensor,
    std: Tensor,
    output: Tensor,
    eps: float,
    momentum: float | Tensor,
    group_size: int,
) -> None:
    """Fill ``output`` and ``norm`` (N, C, L) and ``std`` (C,), and move the running statistics by ``momentum``.

    ``group_size`` is the number of processes, each with as many elements as this one; the running variance is the
    unbiased one of all.
    """
    with kernel_mode(input):
        torch.sqrt(var + eps, out=std)
        norm.copy_((wide(input) - mean[:, None]) / std[:, None])
        output.copy_(norm * weight[:, None] + bias[:, None])
        count = input.size(0) * input.size(2) * group_size
        unbiased = var * (count / (count - 1)) if count > 1 else var
        for running, current in ((running_mean, mean), (running_var, unbiased)):
            running.copy_(momentum * current + (1 - momentum) * running)


def sync_bn_backward_param(grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """Fill ``grad_weight`` and ``grad_bias`` (C,) from ``grad_output`` and ``norm`` (N, C, L)."""
    with kernel_mode(grad_output):
        grad = wide(grad_output)
        grad_weight.copy_((grad * norm).sum((0, 2)))
        grad_bias.copy_(grad.sum((0, 2)))


def sync_bn_backward_data(
    grad_output: Tensor,
    weight: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    norm: Tensor,
    std: Tensor,
    grad_input: Tensor,
) -> None:
    """Fill ``grad_input`` (N, C, L); ``grad_weight`` and ``grad_bias`` (C,) are averages over the processes."""
    with kernel_mode(grad_output):
        count = max(1, grad_output.size(0) * grad_output.size(2))
        common = (grad_weight[:, None] * norm + grad_bias[:, None]) / count
        grad_input.copy_((weight / std)[:, None] * (wide(grad_output) - common))
