"""Log-gates from a low-rank code: argument checks, the definition, and the choice of implementation."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import HAS_TRITON, check_types_and_devices, named_implementation, triton_runs_on


def _triton_log_gates(*args: Tensor | float | int) -> tuple[Tensor, Tensor]:
    """The Triton form; Triton itself is imported when it is first used."""
    from .triton_gates import triton_log_gates

    return triton_log_gates(*args)


def naive_log_gates(
    code: Tensor, weight: Tensor, bias: Tensor, num_heads: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """The definition, in PyTorch; the logits are as autocast makes them, what follows is float32 or wider."""
    logits = F.linear(code, weight.to(code.dtype), bias.to(code.dtype))
    gates = F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))) / temperature
    forward, backward = gates.unflatten(-1, (2, num_heads, -1)).unbind(2)
    return forward, backward


# Each implementation takes (code, weight, bias, num_heads, temperature), all of them checked.
LOG_GATES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"naive": naive_log_gates}
if HAS_TRITON:
    LOG_GATES["triton"] = _triton_log_gates


def log_gates(
    code: Tensor, weight: Tensor, bias: Tensor, num_heads: int, temperature: float = 16.0, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Log-gates of both directions from their low-rank code (ViG, arXiv 2405.18425; official code: `gk_proj`).

    ``logsigmoid(code weight^T + bias) / temperature``; the first half of the channels are the gates of the forward
    scan, the second half those of the backward scan.

    Args:
        code: ``[B, L, R]``, R = 16 in ViG; any strides, float16, bfloat16, float32 or float64.
        weight: ``[2 h K, R]``.
        bias: ``[2 h K]``.
        num_heads: h.
        temperature: the larger, the longer the memory.
        impl: ``'naive'`` (PyTorch), ``'triton'`` (one kernel for NVIDIA GPUs, another one backward; the logits are
            never in memory) or ``'auto'``: the Triton form where it runs (a GPU of compute capability 8.0 or higher,
            torch 2.9 or newer, R up to 64, any type but float64), else PyTorch.

    Returns:
        log_gate_fwd, log_gate_bwd for :func:`vig_kernels.bidirectional_gla`, ``[B, L, h, K]``, at most 0. In float32
        or wider, except that the Triton form gives bfloat16 for a bfloat16 code: rounding to the same relative
        precision as that of queries and keys. Gradients exist for code, weight and bias.

    Raises:
        ValueError: for an unknown `impl`, shapes that do not fit each other, or a temperature that is not positive.
        TypeError: for tensors that are not floating point, or a type that an implementation does not take.
    """
    _check_arguments(code, weight, bias, num_heads, temperature)
    if impl == "auto":
        impl = "triton" if triton_runs_on(code) and code.shape[-1] <= MAX_RANK else "naive"
    return named_implementation(impl, LOG_GATES)(code, weight, bias, num_heads, temperature)


MAX_RANK = 64  # of the Triton form, which holds all ranks in one tile


def _check_arguments(code: Tensor, weight: Tensor, bias: Tensor, num_heads: int, temperature: float) -> None:
    if code.dim() != 3 or 0 in code.shape:
        raise ValueError(f"code must have shape [B, L, R], none of them 0, got {list(code.shape)}")
    R = code.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != R or weight.shape[0] == 0:
        raise ValueError(
            f"weight must have shape [2 h K, {R}], as code {list(code.shape)} asks for, got {list(weight.shape)}"
        )
    if num_heads < 1 or weight.shape[0] % (2 * num_heads):
        raise ValueError(f"weight has {weight.shape[0]} rows, not a multiple of 2 * num_heads = {2 * num_heads}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape {list(weight.shape[:1])}, got {list(bias.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    check_types_and_devices({"code": code, "weight": weight, "bias": bias})
