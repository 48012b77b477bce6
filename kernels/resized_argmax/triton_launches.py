"""The launch of the label map's Triton kernel."""

import torch
from torch import Tensor

from ..launch import ceil_div, check_input, with_unit_stride
from ..online_softmax import class_tile
from ..plans import Plan, call
from ..resampling import Resampling
from . import triton_kernels as kernels

# Classes and pixels of a program's tile, and its warps.
TILE = (4, 128, 2)


def triton_resized_argmax(
    logits: Tensor, rows: Resampling, columns: Resampling, with_scores: bool
) -> tuple[Tensor, Tensor]:
    """One kernel.

    Shapes as in :func:`vig_kernels.resized_argmax`, with whose definition (`naive`) it must agree.

    Raises:
        TypeError: for float64.
        RuntimeError: for tensors that are not on a GPU, outside of Triton's interpreter.
    """
    check_input(logits, "chunk")
    inputs = *with_unit_stride(logits), *_taps(rows, logits.device), *_taps(columns, logits.device)
    classes, *scores = call(_record, inputs, with_scores)
    return classes, scores[0] if with_scores else logits.new_empty(0)


def _taps(resampling: Resampling, device: torch.device) -> tuple[Tensor, Tensor]:
    """Index and weight, [T, N]."""
    index, weight = resampling.index.T.contiguous().int(), resampling.weight.T.contiguous().float()
    return index.to(device, non_blocking=True), weight.to(device, non_blocking=True)


def _record(
    plan: Plan, logits: Tensor, row_index: Tensor, row_weight: Tensor, column_index: Tensor, column_weight: Tensor,
    with_scores: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, C = logits.shape[:2]
    (taps_y, N), (taps_x, M) = row_index.shape, column_index.shape
    classes = plan.empty(B, N, M, dtype=torch.int64)
    scores = plan.empty(B, N, M, dtype=torch.float32) if with_scores else None
    tile = class_tile(C, M, TILE)
    plan.launch(
        kernels.classify, (B * N * ceil_div(M, tile["BX"]),),
        logits, row_index, row_weight, column_index, column_weight, classes, scores, *logits.stride()[:3],
        N, M, taps_y, taps_x, **tile,
    )  # fmt: skip
    return (classes, scores) if with_scores else (classes,)
