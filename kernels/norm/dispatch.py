"""Argument checks and the choice of implementation."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..arguments import HAS_TRITON, check_types_and_devices, named_implementation, triton_runs_on
from .naive import naive_add_norm


def _triton_add_norm(*args: Tensor | float | torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The Triton form; Triton itself is imported when it is first used."""
    from .triton_op import triton_add_norm

    return triton_add_norm(*args)


# Each implementation takes (x, branch, weight, bias, eps, dtype), all of them checked.
IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"naive": naive_add_norm}
if HAS_TRITON:
    IMPLEMENTATIONS["triton"] = _triton_add_norm


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The residual sum and its normalisation over the last dimension, as pre-norm blocks need both.

    ``sum = x + branch`` in the type of `x`; ``norm = (sum - mean) / sqrt(variance + eps) * weight + bias`` (LayerNorm),
    or without `bias` ``sum / sqrt(mean(sum^2) + eps) * weight`` (RMSNorm), in float32 (float64 for float64).

    Args:
        x: the residual stream, ``[..., C]``; float16, bfloat16, float32 or float64.
        branch: what is added, of the same shape; its type may differ. None: nothing.
        weight: ``[C]``.
        bias: ``[C]``, or None for RMSNorm.
        eps: added to the variance, or the mean square.
        dtype: of the norm; that of `x` if None. For products under autocast, the type of the region: PyTorch's own
            norms would write float32 and leave it to each product to convert that.
        impl: ``'naive'`` (PyTorch), ``'triton'`` (one kernel for NVIDIA GPUs, one backward) or ``'auto'``: the Triton
            form where it runs (a GPU of compute capability 8.0 or higher, torch 2.9 or newer, any type but float64, C
            up to 4096) and `torch.compile` does not, which fuses such sums with more of what surrounds them.

    Returns:
        norm and sum (`x` itself if there is no `branch`), ``[..., C]``. Gradients exist for all tensors.

    Raises:
        ValueError: for an unknown `impl`, or shapes that do not fit each other.
        TypeError: for tensors that are not floating point, or a type that an implementation does not take.
    """
    _check_arguments(x, branch, weight, bias)
    if impl == "auto":
        fits = triton_runs_on(x) and x.shape[-1] <= MAX_CHANNELS and not torch.compiler.is_compiling()
        impl = "triton" if fits else "naive"
    return named_implementation(impl, IMPLEMENTATIONS)(x, branch, weight, bias, eps, dtype or x.dtype)


MAX_CHANNELS = 4096  # of the Triton form, which holds all channels of a token in one tile


def _check_arguments(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() == 0 or 0 in x.shape:
        raise ValueError(f"x must have shape [..., C], none of them 0, got {list(x.shape)}")
    expected = {"branch": (branch, x.shape), "weight": (weight, x.shape[-1:]), "bias": (bias, x.shape[-1:])}
    given = {name: (tensor, shape) for name, (tensor, shape) in expected.items() if tensor is not None}
    for name, (tensor, shape) in given.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {list(shape)}, as x {list(x.shape)} asks for, got {list(tensor.shape)}"
            )
    check_types_and_devices({"x": x, **{name: tensor for name, (tensor, _) in given.items()}})
