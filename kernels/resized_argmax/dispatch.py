"""Argument checks and the choice of implementation."""

from collections.abc import Callable

from torch import Tensor

from ..arguments import HAS_TRITON, check_types_and_devices, named_implementation, triton_runs_on, without_autocast
from ..resampling import Resampling
from .chunk import chunk_resized_argmax
from .naive import naive_resized_argmax


def _triton_resized_argmax(*args: Tensor | Resampling | bool) -> tuple[Tensor, Tensor]:
    """The Triton form; Triton itself is imported when it is first used."""
    from .triton_launches import triton_resized_argmax

    return triton_resized_argmax(*args)


# Each implementation takes (logits, rows, columns, with_scores), checked; its scores are of size 0 if nobody wants any.
IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "naive": naive_resized_argmax,
    "chunk": chunk_resized_argmax,
}
if HAS_TRITON:
    IMPLEMENTATIONS["triton"] = _triton_resized_argmax


def resized_argmax(
    logits: Tensor, rows: Resampling, columns: Resampling, with_scores: bool = False, impl: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """The class with the largest logit for every pixel, after maps along both axes; no logits of that size exist.

    What a segmenter does after its head: resize, crop, resize again, perhaps average over windows, then argmax. It
    agrees with `torch.nn.functional.interpolate`, padding, sums and `argmax`, as mmseg's ``EncoderDecoder`` uses them,
    except that what happens in between is not rounded.

    Args:
        logits: ``[B, C, h, w]``, float16, bfloat16, float32 or float64.
        rows: from h rows to N.
        columns: from w columns to M.
        with_scores: whether to return the softmax of the winning class, too.
        impl: ``'naive'`` (PyTorch, full resolution), ``'chunk'`` (PyTorch, some rows at a time; any device),
            ``'triton'`` (NVIDIA GPUs) or ``'auto'``: the Triton form where it runs (a GPU of compute capability 8.0 or
            higher, torch 2.9 or newer, any type but float64), else the chunked form.

    Returns:
        Classes, ``[B, N, M]``, int64, and scores, ``[B, N, M]``, float32 (float64 for float64), or None. No gradients.

    Raises:
        ValueError: for an unknown `impl`, or maps that do not fit the logits.
        TypeError: for logits that are not floating point, or a type that an implementation does not take.
    """
    if logits.dim() != 4 or 0 in logits.shape:
        raise ValueError(f"logits must have shape [B, C, h, w], none of them 0, got {list(logits.shape)}")
    for name, resampling, size in (("rows", rows, logits.shape[2]), ("columns", columns, logits.shape[3])):
        if resampling.size != size:
            raise ValueError(f"{name} takes {resampling.size} inputs, logits {list(logits.shape)} have {size}")
    check_types_and_devices({"logits": logits})
    if impl == "auto":
        impl = "triton" if triton_runs_on(logits) else "chunk"
    implementation = named_implementation(impl, IMPLEMENTATIONS)
    with without_autocast(logits):
        classes, scores = implementation(logits.detach(), rows, columns, with_scores)
    return classes, scores if with_scores else None
