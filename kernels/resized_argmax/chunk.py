"""The label map in PyTorch, some rows at a time."""

import torch
from torch import Tensor

from ..arguments import at_least_float32
from ..resampling import Resampling, block_numbers


def chunk_resized_argmax(
    logits: Tensor, rows: Resampling, columns: Resampling, with_scores: bool
) -> tuple[Tensor, Tensor]:
    """Any device, float64 included.

    Shapes as in :func:`vig_kernels.resized_argmax`, with whose definition (`naive`) it must agree.
    """
    (B, C, *_), N, M = logits.shape, len(rows), len(columns)
    logits = at_least_float32(logits)
    across = columns.matrix().T.to(logits)
    index, weight = rows.index.to(logits.device), rows.weight.to(logits)
    classes = torch.empty(B, N, M, dtype=torch.int64, device=logits.device)
    scores = logits.new_empty(B, N, M) if with_scores else logits.new_empty(0)
    step = max(1, block_numbers(logits) // (C * M))
    for image in range(B):
        for first in range(0, N, step):
            here = image, slice(first, first + step)
            taps = zip(index[here[1]].T, weight[here[1]].T)
            full = sum(logits[image].index_select(1, tap) * share[:, None] for tap, share in taps) @ across
            best, classes[here] = full.max(0)
            if with_scores:
                scores[here] = full.sub_(best).exp_().sum(0).reciprocal_()
    return classes, scores
