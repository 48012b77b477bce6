"""Precision and gradient helpers shared by the operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from vig_kernels.arguments import without_autocast

# Elements of one intermediate tensor; larger work is cut into pieces of about this size.
CHUNK_ELEMENTS = 1 << 23


@contextmanager
def kernel_mode(tensor: Tensor) -> Iterator[None]:
    """Run the body as a compiled kernel would: no graph is recorded and autocast changes no dtype."""
    with torch.no_grad(), without_autocast(tensor):
        yield


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, else float32: torchvision lacks some operators in half and bfloat16."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def wide(tensor: Tensor) -> Tensor:
    """The tensor in its :func:`wide_dtype`."""
    return tensor.to(wide_dtype(tensor))


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of ``sum(function(*inputs) * grad_output)`` by running ``function`` again with a graph.

    ``inputs`` are taken detached and in wide precision; an input that does not matter gets ``None``.
    """
    leaves = [wide(tensor).detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        output = function(*leaves)
    return torch.autograd.grad(output, leaves, grad_output.to(output.dtype), allow_unused=True)


def chunk_length(elements_per_row: int) -> int:
    """How many rows of that many elements to handle at once (at least one)."""
    return max(1, CHUNK_ELEMENTS // max(1, elements_per_row))
