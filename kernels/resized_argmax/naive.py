"""The definition of the label map, in PyTorch."""

from torch import Tensor

from ..arguments import at_least_float32
from ..resampling import Resampling


def naive_resized_argmax(
    logits: Tensor, rows: Resampling, columns: Resampling, with_scores: bool
) -> tuple[Tensor, Tensor]:
    """The definition that every other form must agree with; holds logits of full resolution.

    Shapes as in :func:`vig_kernels.resized_argmax`.
    """
    logits = at_least_float32(logits)
    full = rows.matrix().to(logits) @ logits @ columns.matrix().to(logits).T
    winner, best = full.argmax(1), full.amax(1)
    return winner, (best - full.logsumexp(1)).exp() if with_scores else best.new_empty(0)
