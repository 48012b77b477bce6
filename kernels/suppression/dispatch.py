"""Argument checks and the choice of implementation."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..arguments import HAS_TRITON, check_types_and_devices, named_implementation, triton_runs_on
from .naive import naive_grouped_nms


def _triton_grouped_nms(*args: Tensor | Sequence[int] | float) -> Tensor:
    """The Triton form; Triton itself is imported when it is first used."""
    from .triton_launches import triton_grouped_nms

    return triton_grouped_nms(*args)


# Each implementation takes (boxes, valid, counts, iou_threshold), all of them checked.
IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"naive": naive_grouped_nms}
if HAS_TRITON:
    IMPLEMENTATIONS["triton"] = _triton_grouped_nms


def grouped_nms(
    boxes: Tensor, valid: Tensor, counts: Sequence[int], iou_threshold: float, impl: str = "auto"
) -> Tensor:
    """Greedy non-maximum suppression within each group, for example the levels of a feature pyramid.

    From the first box of a group to the last: one that is still there removes all behind it whose intersection over
    union with it is larger than the threshold. That is `torchvision.ops.nms` of each group, but the result has the
    size of the input, so that the host does not wait for it.

    Args:
        boxes: ``[B, M, 4]``: left, upper, right, lower. Within a group best first.
        valid: ``[B, M]``, bool, the boxes that take part.
        counts: boxes in each group; a group is so many neighbours, and all groups together are the M boxes.
        iou_threshold: in 0..1.
        impl: ``'naive'`` (PyTorch, slow), ``'triton'`` (one kernel for NVIDIA GPUs, a program for each group of an
            image) or ``'auto'``: the Triton form where it runs (a GPU of compute capability 8.0 or higher, torch 2.9 or
            newer, any type but float64), else PyTorch.

    Returns:
        ``[B, M]``, bool: the boxes that are left.

    Raises:
        ValueError: for an unknown `impl`, or shapes that do not fit each other.
        TypeError: for boxes that are not floating point, or `valid` that is not bool.
    """
    if boxes.dim() != 3 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes must have shape [B, M, 4], got {list(boxes.shape)}")
    if valid.shape != boxes.shape[:2]:
        raise ValueError(f"valid must have shape {list(boxes.shape[:2])}, as boxes ask for, got {list(valid.shape)}")
    if valid.dtype != torch.bool:
        raise TypeError(f"valid must be bool, got {valid.dtype}")
    if any(count < 0 for count in counts) or sum(counts) != boxes.shape[1]:
        raise ValueError(f"counts must add up to the {boxes.shape[1]} boxes of an image, got {list(counts)}")
    check_types_and_devices({"boxes": boxes})
    if impl == "auto":
        impl = "triton" if triton_runs_on(boxes) else "naive"
    return named_implementation(impl, IMPLEMENTATIONS)(boxes.detach(), valid, counts, iou_threshold)
