"""Argument checks, packed and padded batches, and the choice of implementation."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..arguments import HAS_TRITON, check_types_and_devices, named_implementation, triton_runs_on
from ..padding import check_valid_sizes, valid_mask
from .chunk import chunk_bidirectional_gla
from .naive import naive_bidirectional_gla


def _triton_bidirectional_gla(*args: Tensor | float | int | None) -> Tensor:
    """The Triton form; Triton itself is imported when it is first used."""
    from .triton_op import triton_bidirectional_gla

    return triton_bidirectional_gla(*args)


# Each implementation takes (q, k, v, log_gate_fwd, log_gate_bwd, scale), all of them checked.
IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "naive": naive_bidirectional_gla,
    "chunk": chunk_bidirectional_gla,
}
if HAS_TRITON:
    IMPLEMENTATIONS["triton"] = _triton_bidirectional_gla


def bidirectional_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate_fwd: Tensor,
    log_gate_bwd: Tensor,
    scale: float | None = None,
    impl: str = "auto",
    *,
    cu_seqlens: Tensor | None = None,
    valid_sizes: Tensor | None = None,
    width: int | None = None,
) -> Tensor:
    """Bidirectional gated linear attention over a token sequence (ViG, arXiv 2405.18425, equations of section 3).

    ``S_t = diag(exp g_t) S_{t-1} + k_t^T v_t`` and ``o_t = scale * q_t S_t`` from the first token with
    `log_gate_fwd`, the same from the last token with `log_gate_bwd`; the result is the mean of the two. Both
    directions include the token itself.

    Args:
        q, k: queries and keys, ``[B, L, h, K]``; any strides, float16, bfloat16, float32 or float64.
        v: values, ``[B, L, h, V]``, the type of `q`.
        log_gate_fwd, log_gate_bwd: natural logarithms of the gates (:func:`log_gates`), at most 0,
            ``[B, L, h, K]``; finite, however strong. Their type may be wider than that of `q`.
        scale: factor on the queries; ``K ** -0.5`` if None.
        impl: ``'naive'`` (the definition), ``'chunk'`` (PyTorch, any device, linear in L), ``'triton'`` (fused
            kernels for NVIDIA GPUs) or ``'auto'``: the Triton form where it runs (a GPU of compute capability 8.0 or
            higher, torch 2.9 or newer, any type but float64), else the chunked form.
        cu_seqlens: packed sequences, which do not see each other: B is 1, and sequence i holds the tokens
            ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]`` (excluded). ``[S + 1]``, integers on the device of `q`, from 0
            to L, ascending; that is checked on the CPU alone, where it costs no synchronisation.
        valid_sizes: padded batches: the tokens are the rows of a grid `width` wide, and of image b only the first
            ``valid_sizes[b, 0]`` rows and ``valid_sizes[b, 1]`` columns are tokens. The rest neither adds to the
            states nor decays them, and its output is 0: an image's result does not depend on its padding.
            ``[B, 2]``, integers on the device of `q`.
        width: tokens in a row of the grid; needed with `valid_sizes` only.

    Returns:
        ``[B, L, h, V]`` in the type of `v`. Gradients exist for all five tensors.

    Raises:
        ValueError: for an unknown `impl`, or shapes that do not fit each other.
        TypeError: for tensors that are not floating point, or types that an implementation cannot mix.
    """
    _check_arguments(q, k, v, log_gate_fwd, log_gate_bwd)
    segments = _segments(cu_seqlens, q)
    check_valid_sizes(valid_sizes, "q", q)
    _check_width(width, valid_sizes, q)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    function = select_implementation(impl, q, k, v)
    if function is _triton_bidirectional_gla:
        return function(q, k, v, log_gate_fwd, log_gate_bwd, scale, segments, valid_sizes, width or 1)
    if segments is not None:
        log_gate_fwd, log_gate_bwd = _close_borders(log_gate_fwd, log_gate_bwd, segments)
    if valid_sizes is None:
        return function(q, k, v, log_gate_fwd, log_gate_bwd, scale)
    padding = ~valid_mask(valid_sizes, q.shape[1] // width, width).flatten(1)[:, :, None, None]
    inputs = (x.masked_fill(padding, 0) for x in (q, k, v, log_gate_fwd, log_gate_bwd))
    return function(*inputs, scale)


def select_implementation(impl: str, q: Tensor, k: Tensor, v: Tensor) -> Callable[..., Tensor]:
    """The function behind a name; for ``'auto'``, the fastest that takes these tensors."""
    if impl == "auto":
        impl = "triton" if _triton_takes(q, k, v) else "chunk"
    return named_implementation(impl, IMPLEMENTATIONS)


def _triton_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    # Autocast brings q, k and v to one type; without it the chunked form does.
    return triton_runs_on(q) and (q.dtype == k.dtype == v.dtype or torch.is_autocast_enabled("cuda"))


def _segments(cu_seqlens: Tensor | None, q: Tensor) -> Tensor | None:
    """The number of each token's sequence, [L], int32."""
    if cu_seqlens is None:
        return None
    B, L = q.shape[:2]
    if B != 1:
        raise ValueError(f"cu_seqlens packs the sequences into one row: expected B = 1, got {B}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            "cu_seqlens must hold the integers [0, .., L], one more than sequences, got "
            f"shape {list(cu_seqlens.shape)}, {cu_seqlens.dtype}"
        )
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, q on {q.device}: move them to one device")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        borders = cu_seqlens.tolist()
        if borders[0] != 0 or borders[-1] != L or borders != sorted(borders):
            raise ValueError(f"cu_seqlens must ascend from 0 to L = {L}, got {borders[:8]} .. {borders[-1]}")
    tokens = torch.arange(L, device=q.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, tokens, right=True, out_int32=True)


def _check_width(width: int | None, valid_sizes: Tensor | None, q: Tensor) -> None:
    if valid_sizes is None:
        if width is not None:
            raise ValueError("width is the width of the grid of valid_sizes: give both or neither")
        return
    L = q.shape[1]
    if width is None or width < 1 or L % width:
        raise ValueError(f"valid_sizes needs the width of the grid, a divisor of L = {L}, got width={width}")


def _close_borders(log_gate_fwd: Tensor, log_gate_bwd: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """Gates that let nothing pass into the first token of a sequence, and from behind into its last one."""
    border = segments[1:] != segments[:-1]
    edge = border.new_zeros(1)
    starts, ends = torch.cat((edge, border)), torch.cat((border, edge))
    closed = float("-inf")
    return (
        log_gate_fwd.masked_fill(starts[:, None, None], closed),
        log_gate_bwd.masked_fill(ends[:, None, None], closed),
    )


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
    check_types_and_devices({"q": q, "k": k, "v": v, "log_gate_fwd": log_gate_fwd, "log_gate_bwd": log_gate_bwd})
