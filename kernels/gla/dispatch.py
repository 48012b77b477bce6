"""Argument checks and the choice of implementation."""

from collections.abc import Callable

import torch
from torch import Tensor

from .chunk import chunk_bidirectional_gla
from .naive import naive_bidirectional_gla

# Each implementation takes (q, k, v, log_gate_fwd, log_gate_bwd, scale), all of them checked.
IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "naive": naive_bidirectional_gla,
    "chunk": chunk_bidirectional_gla,
}


def bidirectional_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate_fwd: Tensor,
    log_gate_bwd: Tensor,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Bidirectional gated linear attention over a token sequence (ViG, arXiv 2405.18425, equations of section 3).

    ``S_t = diag(exp g_t) S_{t-1} + k_t^T v_t`` and ``o_t = scale * q_t S_t`` from the first token with
    `log_gate_fwd`, the same from the last token with `log_gate_bwd`; the result is the mean of the two. Both
    directions include the token itself.

    Args:
        q, k: queries and keys, ``[B, L, h, K]``; any strides, float16, bfloat16, float32 or float64.
        v: values, ``[B, L, h, V]``, the type of `q`.
        log_gate_fwd, log_gate_bwd: natural logarithms of the gates, at most 0, ``[B, L, h, K]``; finite, however
            strong. Their type may be wider than that of `q`.
        scale: factor on the queries; ``K ** -0.5`` if None.
        impl: ``'naive'`` (the definition), ``'chunk'`` (PyTorch, any device, linear in L) or ``'auto'``.

    Returns:
        ``[B, L, h, V]`` in the type of `v`. Gradients exist for all five tensors.

    Raises:
        ValueError: for an unknown `impl`, or shapes that do not fit each other.
        TypeError: for tensors that are not floating point.
    """
    _check_arguments(q, k, v, log_gate_fwd, log_gate_bwd)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return select_implementation(impl)(q, k, v, log_gate_fwd, log_gate_bwd, scale)


def select_implementation(impl: str) -> Callable[..., Tensor]:
    """The function behind a name; ``'auto'`` is the fastest one that is there."""
    if impl == "auto":
        impl = "triton" if "triton" in IMPLEMENTATIONS else "chunk"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is not available: expected 'auto' or one of {sorted(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[impl]


def _check_arguments(q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor) -> None:
    if q.dim() != 4:
        raise ValueError(f"q must have shape [B, L, h, K], got {list(q.shape)}")
    for name, tensor in (("k", k), ("log_gate_fwd", log_gate_fwd), ("log_gate_bwd", log_gate_bwd)):
        if tensor.shape != q.shape:
            raise ValueError(f"{name} must have the shape of q, {list(q.shape)}, got {list(tensor.shape)}")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must have shape [B, L, h, V] with {list(q.shape[:3])} in front, got {list(v.shape)}")
    if 0 in q.shape or v.shape[-1] == 0:
        raise ValueError(f"empty input: q {list(q.shape)}, v {list(v.shape)}; every dimension must be at least 1")
    for name, tensor in (("q", q), ("k", k), ("v", v), ("log_gate_fwd", log_gate_fwd), ("log_gate_bwd", log_gate_bwd)):
        if not torch.is_floating_point(tensor):
            raise TypeError(f"{name} must be a floating point tensor, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}: move them to one device")
