"""The launch of the suppression's Triton kernel."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from ..launch import check_input
from ..plans import Plan, call
from . import triton_kernels as kernels

# Boxes that are decided at once, boxes before them that a tile holds, warps.
TILE = dict(BI=32, BJ=512, num_warps=16)


def triton_grouped_nms(boxes: Tensor, valid: Tensor, counts: Sequence[int], iou_threshold: float) -> Tensor:
    """One kernel, in which every group of every image is one program.

    Shapes as in :func:`vig_kernels.grouped_nms`, with whose definition (`naive`) it must agree.

    Raises:
        TypeError: for float64.
        RuntimeError: for tensors that are not on a GPU, outside of Triton's interpreter.
    """
    check_input(boxes, "naive")
    if not valid.numel():
        return valid.clone()
    inputs = boxes.contiguous(), valid.contiguous().view(torch.uint8), _starts(tuple(counts), boxes.device)
    return call(_record, inputs, iou_threshold)[0].view(torch.bool)


@lru_cache(maxsize=1024)
def _starts(counts: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)


def _record(plan: Plan, boxes: Tensor, valid: Tensor, starts: Tensor, iou_threshold: float) -> tuple[Tensor]:
    (B, M), groups = valid.shape, len(starts) - 1
    kept = plan.empty(B, M, dtype=torch.uint8)
    plan.launch(kernels.suppress, (B * groups,), boxes, valid, kept, starts, M, groups, iou_threshold, **TILE)
    return (kept,)
