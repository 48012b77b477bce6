"""Argument checks and the choice of implementation."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..arguments import HAS_TRITON, check_types_and_devices, named_implementation, triton_runs_on, type_of_products
from .naive import naive_linear_swiglu


def _triton_linear_swiglu(*args: Tensor) -> Tensor:
    """The Triton form; Triton itself is imported when it is first used."""
    from .triton_op import triton_linear_swiglu

    return triton_linear_swiglu(*args)


# Each implementation takes (x, weight), both checked.
IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"naive": naive_linear_swiglu}
if HAS_TRITON:
    IMPLEMENTATIONS["triton"] = _triton_linear_swiglu


def linear_swiglu(x: Tensor, weight: Tensor, impl: str = "auto") -> Tensor:
    """A linear layer without bias and SwiGLU (Shazeer, arXiv 2002.05202), the first half of a feed-forward part.

    ``SiLU(x W1^T) * (x W2^T)``, with both matrices in one weight. The official code of ViG does the same in `nn.Linear`
    and a product of halves.

    Args:
        x: ``[.., C]`` with any number of leading dimensions; any strides, float16, bfloat16, float32 or float64.
        weight: ``[2 D, C]``, W1 (gates), then W2 (values), as `nn.Linear(C, 2 * D, bias=False)` has it; taken to the
            type of `x`.
        impl: ``'naive'`` (PyTorch), ``'triton'`` (one kernel for NVIDIA GPUs; backward three products and a kernel,
            for the memory of gates and values, which it does not keep) or ``'auto'``: the Triton form for products of
            float16 and bfloat16 where it runs (a GPU of compute capability 8.0 or higher, torch 2.9 or newer), else
            PyTorch.

    Returns:
        ``[.., D]`` in the type of `x`, or, like of any linear layer, in that of an autocast region; summed in float32
        (float64 for float64). Gradients exist for both tensors.

    Raises:
        ValueError: for an unknown `impl`, or shapes that do not fit each other.
        TypeError: for tensors that are not floating point, or a type that an implementation does not take.
    """
    _check_arguments(x, weight)
    if impl == "auto":
        impl = "triton" if triton_runs_on(x) and type_of_products(x) != torch.float32 else "naive"
    return named_implementation(impl, IMPLEMENTATIONS)(x, weight)


def _check_arguments(x: Tensor, weight: Tensor) -> None:
    if x.dim() == 0 or 0 in x.shape:
        raise ValueError(f"x must have shape [.., C], none of them 0, got {list(x.shape)}")
    C = x.shape[-1]
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[0] % 2 or weight.shape[1] != C:
        raise ValueError(
            f"weight must have shape [2 D, {C}], as x {list(x.shape)} asks for, got {list(weight.shape)}"
        )  # fmt: skip
    check_types_and_devices({"x": x, "weight": weight})
