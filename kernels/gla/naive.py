"""The definition of bidirectional gated linear attention: two plain loops over time."""

import torch
from torch import Tensor


def naive_gla(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, reverse: bool = False) -> Tensor:
    """One direction: ``S_t = diag(exp g_t) S_{t-1} + k_t^T v_t``, ``o_t = q_t S_t``; from the last if `reverse`."""
    B, L, h, K = q.shape
    state = q.new_zeros(B, h, K, v.shape[-1])
    outputs: list[Tensor] = [state] * L
    for t in reversed(range(L)) if reverse else range(L):
        state = log_gate[:, t].exp()[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs[t] = (q[:, t, :, :, None] * state).sum(-2)  # [B, h, V]
    return torch.stack(outputs, dim=1)


def naive_bidirectional_gla(
    q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor, scale: float
) -> Tensor:
    """The definition that every other form must agree with; O(L) steps, for tests only.

    Shapes as in :func:`vig_kernels.bidirectional_gla`. Computes in the promoted type of the inputs, so that float64
    inputs give a float64 reference.
    """
    forward = naive_gla(q, k, v, log_gate_fwd)
    backward = naive_gla(q, k, v, log_gate_bwd, reverse=True)
    return (forward + backward) * (scale / 2)
