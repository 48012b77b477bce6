"""Bidirectional gated linear attention for exporters: one graph for any number of tokens, nothing written in place.

The chunked form of `vig_kernels` decides by the number of tokens how it computes; a graph cannot. Here chunks are
always CHUNK tokens. Within a block of BLOCK tokens, each pair has its own decay; from there on, blocks double up to a
chunk: the tokens of one half meet those of the other, with the decay split at the middle of the block, so that both
factors are at most 1. Between chunks, each has its decay to each. All decays are exponentials of sums of log-gates,
never of a difference of two sums.

The products between chunks grow with (L / CHUNK)^2. For heads of 32 and 64 channels they are a fifth of all at 4,096
tokens, and half at 14,000.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK, BLOCK = 64, 8


def _sums_of_pairs() -> tuple[Tensor, Tensor]:
    """Forward and backward, the gates between each pair of tokens of a small block: [BLOCK^2, BLOCK] ones and zeros."""
    t, s, j = torch.meshgrid(*[torch.arange(BLOCK)] * 3, indexing="ij")
    return ((s < j) & (j <= t)).flatten(0, 1).float(), ((t <= j) & (j < s)).flatten(0, 1).float()


# Made once, so that they are constants of a graph and not steps in it.
BETWEEN_PAIRS = _sums_of_pairs()
DIRECTIONS = 1 + torch.eye(BLOCK)  # a token meets itself in both
TRIANGLES = {C: torch.ones(C, C).tril() for C in (8, 16, 32, 64)}  # sums up to each token, itself included
STRICT_TRIANGLES = {C: torch.ones(C, C).tril(-1) for C in TRIANGLES}  # without itself
TRIANGLES_UP = {C: x.mT.contiguous() for C, x in TRIANGLES.items()}  # from each token on
STRICT_TRIANGLES_UP = {C: x.mT.contiguous() for C, x in STRICT_TRIANGLES.items()}


def exportable_gla(q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor, scale: float) -> Tensor:
    """Shapes as in :func:`vig_kernels.bidirectional_gla`; for inference. Computes in float32 (float64 for float64)."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    B, L, h, V = v.shape
    q, k, values, fwd, bwd = (_to_chunks(_cast(x, dtype)) for x in (q, k, v, log_gate_fwd, log_gate_bwd))
    out = _within_small_blocks(q, k, values, fwd, bwd) + _between_chunks(q, k, values, fwd, bwd)
    half = BLOCK
    while half < CHUNK:
        out = out + _between_halves(q, k, values, fwd, bwd, half)
        half *= 2
    out = out.permute(0, 2, 3, 1, 4).reshape(B, -1, h, V)[:, :L]
    return _cast(out * (scale / 2), v.dtype)


def _to_chunks(x: Tensor) -> Tensor:
    """[B, L, h, D] -> [B, h, N, CHUNK, D], padded with zeros: no keys, and gates that let everything pass."""
    B, L, h, D = x.shape
    chunks = (L + CHUNK - 1) // CHUNK
    if not isinstance(L, int):
        chunks = chunks + 1  # torch takes one chunk for a case of its own, and two or more for another
    x = F.pad(x, (0, 0, 0, 0, 0, chunks * CHUNK - L))
    return x.reshape(B, chunks, CHUNK, h, D).permute(0, 3, 1, 2, 4)


def _within_small_blocks(q: Tensor, k: Tensor, v: Tensor, fwd: Tensor, bwd: Tensor) -> Tensor:
    """What each token gets from those of its block of BLOCK tokens, itself in both directions: [B, h, N, CHUNK, V]."""
    q, k, v, fwd, bwd = (x.unflatten(3, (-1, BLOCK)) for x in (q, k, v, fwd, bwd))
    forward, backward = (_like(x, q) for x in BETWEEN_PAIRS)
    decay = (forward @ fwd + backward @ bwd).exp().unflatten(-2, (BLOCK, BLOCK))
    scores = (q.unsqueeze(-2) * k.unsqueeze(-3) * decay).sum(-1)
    return (scores * _like(DIRECTIONS, q) @ v).flatten(3, 4)


def _between_halves(q: Tensor, k: Tensor, v: Tensor, fwd: Tensor, bwd: Tensor, half: int) -> Tensor:
    """What the tokens of one half of each block of 2 `half` tokens get from those of the other: [B, h, N, CHUNK, V]."""
    (q_l, q_r), (k_l, k_r), (v_l, v_r), (fwd_l, fwd_r), (bwd_l, bwd_r) = (
        x.unflatten(3, (-1, 2, half)).unbind(4)
        for x in (q, k, v, fwd, bwd)  # [B, h, N, blocks, half, D]
    )
    right = _scores(q_r, _up_to(fwd_r), k_l, _behind(fwd_l)) @ v_l
    left = _scores(q_l, _from(bwd_l), k_r, _before(bwd_r)) @ v_r
    return torch.stack((left, right), 4).flatten(3, 5)


def _scores(q: Tensor, log_decay_q: Tensor, k: Tensor, log_decay_k: Tensor) -> Tensor:
    return (q * log_decay_q.exp()) @ (k * log_decay_k.exp()).mT


def _between_chunks(q: Tensor, k: Tensor, v: Tensor, fwd: Tensor, bwd: Tensor) -> Tensor:
    """What the tokens of each chunk get from all other chunks: [B, h, N, CHUNK, V]."""
    from_left = (k * _behind(fwd).exp()).mT @ v  # [B, h, N, K, V]
    from_right = (k * _before(bwd).exp()).mT @ v
    left = _pass_on(_decay_between(fwd.sum(3)), from_left)
    right = _pass_on(_decay_between(bwd.sum(3)).mT, from_right)
    return (q * _up_to(fwd).exp()) @ left + (q * _from(bwd).exp()) @ right


def _pass_on(decay: Tensor, states: Tensor) -> Tensor:
    """decay [B, h, K, N, N], states [B, h, N, K, V] -> what each chunk receives, [B, h, N, K, V]."""
    return (decay @ states.transpose(2, 3)).transpose(2, 3)


def _decay_between(totals: Tensor) -> Tensor:
    """Sums over chunks, [B, h, N, K] -> decay across the chunks between n and m < n, [B, h, K, N, N], 0 for m >= n."""
    N = totals.shape[2]
    index = torch.arange(N, device=totals.device)
    n, m = index[:, None], index[None]
    before = F.pad(totals, (0, 0, 1, 0))[:, :, :N].transpose(2, 3)  # of chunk n - 1
    between = torch.where(n - 1 > m, before[..., None], 0.0).cumsum(3)
    return torch.where(n > m, between.exp(), 0.0)


def _up_to(log_gate: Tensor) -> Tensor:
    """[.., C, K] -> the sum from the first token to each, itself included."""
    return _like(TRIANGLES[log_gate.shape[-2]], log_gate) @ log_gate


def _before(log_gate: Tensor) -> Tensor:
    """The sum from the first token to each, without itself."""
    return _like(STRICT_TRIANGLES[log_gate.shape[-2]], log_gate) @ log_gate


def _from(log_gate: Tensor) -> Tensor:
    """The sum from each token to the last, itself included."""
    return _like(TRIANGLES_UP[log_gate.shape[-2]], log_gate) @ log_gate


def _behind(log_gate: Tensor) -> Tensor:
    """The sum from each token to the last, without itself."""
    return _like(STRICT_TRIANGLES_UP[log_gate.shape[-2]], log_gate) @ log_gate


def _like(constant: Tensor, x: Tensor) -> Tensor:
    """A constant with the type and device of x; a graph has no step for it where it has them already."""
    return constant if constant.dtype == x.dtype and constant.device == x.device else constant.to(x)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)
