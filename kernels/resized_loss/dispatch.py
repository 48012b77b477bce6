"""Argument checks and the choice of implementation."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..arguments import HAS_TRITON, check_types_and_devices, named_implementation, triton_runs_on
from .naive import naive_resized_cross_entropy
from .op import apply

# Each implementation takes (logits, labels, ignore_index, align_corners), all of them checked.
IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "naive": naive_resized_cross_entropy,
    "chunk": partial(apply, "chunk"),
}
if HAS_TRITON:
    IMPLEMENTATIONS["triton"] = partial(apply, "triton")


def resized_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int = 255, align_corners: bool = False, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits, bilinearly resized to the size of the labels, which never exist at that size.

    The loss path of a segmentation head. ``z = interpolate(logits, [H, W], mode='bilinear', align_corners)``; then, for
    every pixel p, ``loss[p] = logsumexp(z[p]) - z[p, labels[p]]``, and whether class ``labels[p]`` has the largest
    logit. Mean, weights of classes and of pixels are left to PyTorch: they work on one number a pixel. It agrees with
    `torch.nn.functional.interpolate` and `cross_entropy`, as mmseg's ``BaseDecodeHead.loss_by_feat`` uses them.

    Args:
        logits: ``[B, C, h, w]``, float16, bfloat16, float32 or float64.
        labels: ``[B, H, W]``, integers of any type: a class below C, or `ignore_index`.
        ignore_index: label of pixels whose loss is 0, and that are no hits.
        align_corners: whether corner pixels of both sizes lie upon each other, as in `interpolate`.
        impl: ``'naive'`` (PyTorch, full resolution), ``'chunk'`` (PyTorch, some rows at a time; any device),
            ``'triton'`` (NVIDIA GPUs; deterministic, unlike PyTorch's own gradient of `interpolate`) or ``'auto'``:
            the Triton form where it runs (a GPU of compute capability 8.0 or higher, torch 2.9 or newer, any type but
            float64), else the chunked form.

    Returns:
        The loss, ``[B, H, W]`` in float32 (float64 for float64), and hits, ``[B, H, W]``, boolean. The gradient of the
        logits has their type; in low precision they are interpolated in float32, which `interpolate` does not do.

    Raises:
        ValueError: for an unknown `impl`, or shapes that do not fit each other.
        TypeError: for logits that are not floating point, labels that are not integers, or a type that an
            implementation does not take.
        IndexError: for a label that is no class, on the CPU. On a GPU a failed assertion stops the device, as in
            `cross_entropy`.
    """
    _check_arguments(logits, labels)
    if impl == "auto":
        impl = "triton" if triton_runs_on(logits) else "chunk"
    implementation = named_implementation(impl, IMPLEMENTATIONS)
    _check_labels(labels, logits.shape[1], ignore_index)
    return implementation(logits, labels, ignore_index, align_corners)


def _check_arguments(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 4 or 0 in logits.shape:
        raise ValueError(f"logits must have shape [B, C, h, w], none of them 0, got {list(logits.shape)}")
    B = logits.shape[0]
    if labels.dim() != 3 or labels.shape[0] != B or 0 in labels.shape:
        raise ValueError(
            f"labels must have shape [{B}, H, W], as logits {list(logits.shape)} ask for, got {list(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    check_types_and_devices({"logits": logits})
    if labels.device != logits.device:
        raise ValueError(f"labels are on {labels.device}, logits on {logits.device}: move them to one device")


def _check_labels(labels: Tensor, C: int, ignore_index: int) -> None:
    message = f"a label is neither a class, 0 to {C - 1}, nor ignore_index={ignore_index}"
    valid = (((labels >= 0) & (labels < C)) | (labels == ignore_index)).all()
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        if not valid:
            raise IndexError(message)
    else:
        torch._assert_async(valid, message)  # does not wait for the device
