"""The definition of the loss, in PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from ..arguments import at_least_float32


def naive_resized_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """The definition that every other form must agree with; holds logits of full resolution several times.

    Shapes as in :func:`vig_kernels.resized_cross_entropy`.
    """
    logits, labels = at_least_float32(logits), labels.long()
    full = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=align_corners)
    loss = F.cross_entropy(full, labels, reduction="none", ignore_index=ignore_index)
    return loss, (full.argmax(1) == labels) & (labels != ignore_index)
