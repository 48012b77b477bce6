"""The losses of a sample with weights 0 and 1, by the loss modules of the heads."""

import torch
from mmdet.models.losses import (
    BalancedL1Loss,
    CIoULoss,
    CrossEntropyLoss,
    DIoULoss,
    GIoULoss,
    IoULoss,
    L1Loss,
    SmoothL1Loss,
)
from mmdet.models.losses.utils import weight_reduce_loss
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from torch import Tensor, nn

from ..errors import ConfigError

BOX_LOSSES = (L1Loss, SmoothL1Loss, BalancedL1Loss, IoULoss, GIoULoss, DIoULoss, CIoULoss)


def check_losses(loss_cls: nn.Module, loss_bbox: nn.Module, coder: object, stock: str) -> None:
    """ConfigError, naming the class `stock` to use instead, unless the losses and the box coder are supported."""
    if type(loss_cls) is not CrossEntropyLoss or loss_cls.ignore_index is not None:
        raise ConfigError(
            f"loss_cls must be a CrossEntropyLoss without ignore_index, not {type(loss_cls).__name__}; use {stock}"
        )
    if type(loss_bbox) not in BOX_LOSSES:
        names = ", ".join(loss.__name__ for loss in BOX_LOSSES)
        raise ConfigError(f"loss_bbox must be one of {names}, not {type(loss_bbox).__name__}; use {stock}")
    if type(coder) is not DeltaXYWHBBoxCoder or coder.use_box_type:
        raise ConfigError(
            f"bbox_coder must be a DeltaXYWHBBoxCoder without use_box_type, not {type(coder).__name__}; use {stock}"
        )


def box_loss(loss: nn.Module, predictions: Tensor, targets: Tensor, weights: Tensor, avg_factor: Tensor) -> Tensor:
    """`loss` of [N, 4] and [N, 4], rows weighted by `weights` [N], over `avg_factor` [].

    Weighted here because mmdet's box losses ask the device whether any weight is positive when they are given some.
    """
    each = loss(predictions, targets, reduction_override="none")  # [N, 4], or [N] for overlaps
    weights = weights.to(each.dtype)
    return weight_reduce_loss(each, weights[:, None] if each.dim() == 2 else weights, loss.reduction, avg_factor)


def class_loss(loss: nn.Module, scores: Tensor, labels: Tensor, weights: Tensor, avg_factor: Tensor) -> Tensor:
    """`loss` of scores [N, C] and labels [N], background being the last class or, with sigmoid, none."""
    if loss.use_sigmoid and scores.size(1) == 1:
        # In one dimension mmdet takes the labels as targets; in two it looks for those that are not background.
        scores, labels = scores.squeeze(1), 1 - labels
    return loss(scores, labels, weights, avg_factor=avg_factor)


def accuracy(scores: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """Percent of the valid rows of scores [N, C] whose best class is that of `labels` [N], of shape [1] as mmdet's."""
    right = (scores.argmax(1) == labels) & valid
    return 100.0 * right.sum(0, keepdim=True) / valid.sum().clamp(min=1)


def sample_weights(positive: Tensor, valid: Tensor, pos_weight: float) -> Tensor:
    """1 for the valid samples, `pos_weight` for the positive ones if above 0."""
    weights = valid.float()
    return torch.where(positive, pos_weight, weights) if pos_weight > 0 else weights
