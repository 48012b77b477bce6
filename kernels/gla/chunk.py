"""Chunked PyTorch form of bidirectional gated linear attention: any device, exact for every finite gate.

A chunk of C tokens is halved recursively. At half size m, the right half's queries meet the left half's keys (forward
scan) and the left half's queries the right half's keys (backward scan); the decay between two tokens is split at the
boundary between the halves, so that every factor is the exponential of a sum of log-gates on one side of the boundary:
at most 1, never overflowing, and never the difference of two large sums. Both directions fill one C x C score matrix.
Across chunks the states of both directions stack along K. README.md of this folder derives it, gradients included.

Arrays inside are ``[N, B*h, C, .]`` with N chunks, so that the scan over chunks walks contiguous blocks.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

MAX_CHUNK = 64


class _Level(NamedTuple):
    """Decay to and from the middle of each block of 2m tokens, [N, B*h, C, K], one tensor a direction.

    Forward: the factors of the queries in right halves and of the keys in left halves; backward: the other way round.
    """

    fwd: Tensor
    bwd: Tensor


class _Whole(NamedTuple):
    """Decay factors of queries and keys to the borders of their chunk, [N, B*h, C, K]."""

    q_fwd: Tensor
    k_fwd: Tensor
    q_bwd: Tensor
    k_bwd: Tensor


def chunk_bidirectional_gla(
    q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor, scale: float
) -> Tensor:
    """Linear in L in time and memory; computes in float32 (float64 for float64 inputs), whatever autocast says.

    Shapes as in :func:`vig_kernels.bidirectional_gla`, with which the definition (`naive`) it must agree.
    Keeps the inputs for the backward pass and recomputes the rest.
    """
    with _without_autocast(q):
        return _ChunkGLA.apply(q, k, v, log_gate_fwd, log_gate_bwd, scale)


class _ChunkGLA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, log_gate_fwd, log_gate_bwd)
        ctx.scale = scale
        inputs = _to_chunks(q, k, v, log_gate_fwd, log_gate_bwd)
        out = _forward(*inputs).mul_(scale / 2)
        return _from_chunks(out, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        chunks = _to_chunks(*inputs, grad_out)
        with _without_autocast(grad_out):  # backward() may be called inside an autocast region
            grads = _backward(*chunks[:5], chunks[5].mul_(ctx.scale / 2))
        return *(_from_chunks(grad, tensor) for grad, tensor in zip(grads, inputs)), None


def _without_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast switched off on the device of x; some, like meta, have none."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _chunk_size(L: int) -> int:
    """A power of two up to MAX_CHUNK; halved while that saves an eighth of the padded length or more."""
    size = MAX_CHUNK
    while size > 8 and -L % size >= -L % (size // 2) + (L + -L % size) // 8:
        size //= 2
    return size


def _to_chunks(*tensors: Tensor) -> list[Tensor]:
    """[B, L, h, D] each -> fresh [N, B*h, C, D] in the computing type, padded with zeros (no key, an open gate)."""
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    B, L, h, _ = tensors[0].shape
    C = _chunk_size(L)
    N = -(-L // C)
    chunks = []
    for x in tensors:
        D = x.shape[-1]
        out = torch.empty(N, B, h, C, D, dtype=dtype, device=x.device)
        whole = L // C
        out[:whole] = x[:, : whole * C].reshape(B, whole, C, h, D).permute(1, 0, 3, 2, 4)
        if whole < N:
            rest = L - whole * C
            out[whole, :, :, :rest] = x[:, whole * C :].transpose(1, 2)
            out[whole, :, :, rest:] = 0
        chunks.append(out.view(N, B * h, C, D))
    return chunks


def _from_chunks(x: Tensor, like: Tensor) -> Tensor:
    """[N, B*h, C, D] -> [B, L, h, D] in the type and shape of `like`."""
    B, L, h, D = like.shape
    N, _, C, _ = x.shape
    x = x.view(N, B, h, C, D).permute(1, 0, 3, 2, 4).reshape(B, N * C, h, D)
    return x[:, :L].to(like.dtype)


def _halves(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """[.., C, D] -> left and right halves [.., C/2m, m, D] of each block of 2m, as views."""
    left, right = x.unflatten(-2, (-1, 2, m)).unbind(-3)
    return left, right


def _score_blocks(scores: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Views of [.., C, C] on the blocks between halves of size m, [.., C/2m, m, m]: (right x left, left x right)."""
    blocks = scores.unflatten(-1, (-1, 2, m)).unflatten(-4, (-1, 2, m)).diagonal(dim1=-6, dim2=-3).movedim(-1, -5)
    return blocks[..., 1, :, 0, :], blocks[..., 0, :, 1, :]


def _exp_of_halves(left: Tensor, right: Tensor) -> Tensor:
    """exp of two sets of halves [.., n, m, K], side by side again as [.., C, K]; contiguous, hence fast, on a CPU."""
    return torch.stack((left, right), -3).exp_().flatten(-4, -2)


def _decays(log_gate_fwd: Tensor, log_gate_bwd: Tensor) -> tuple[list[_Level], _Whole, Tensor]:
    """Decay factors of every level (half sizes 1, 2, .. C/2), of the whole chunk, and across it.

    Sums over blocks double in size from level to level by adding the neighbour's total, so no sum is ever a
    difference. Returns the levels, the whole chunk's factors and the decay across it, [N, B*h, 2K].
    """
    prefix_f, suffix_b = log_gate_fwd.clone(), log_gate_bwd.clone()  # inclusive
    suffix_f, prefix_b = torch.zeros_like(log_gate_fwd), torch.zeros_like(log_gate_bwd)  # exclusive
    levels = []
    m = 1
    while m < log_gate_fwd.shape[-2]:
        (pf_l, pf_r), (sf_l, _) = _halves(prefix_f, m), _halves(suffix_f, m)
        (sb_l, sb_r), (_, pb_r) = _halves(suffix_b, m), _halves(prefix_b, m)
        levels.append(_Level(_exp_of_halves(sf_l, pf_r), _exp_of_halves(sb_l, pb_r)))
        sf_l += pf_r[..., -1:, :]
        pf_r += pf_l[..., -1:, :]
        pb_r += sb_l[..., :1, :]
        sb_l += sb_r[..., :1, :]
        m *= 2
    across = torch.cat((prefix_f[..., -1, :], suffix_b[..., 0, :]), -1).exp_()
    return levels, _Whole(prefix_f.exp_(), suffix_f.exp_(), suffix_b.exp_(), prefix_b.exp_()), across


def _scores(q: Tensor, k: Tensor, levels: list[_Level]) -> Tensor:
    """Decayed q k^T inside each chunk, both directions in one matrix; the diagonal belongs to both: [N, B*h, C, C]."""
    scores = torch.empty(*q.shape[:-1], q.shape[-2], dtype=q.dtype, device=q.device)
    scores.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1).mul_(2))
    for i, level in enumerate(levels):
        m = 2**i
        (q_l, q_r), (k_l, k_r) = _halves(q, m), _halves(k, m)
        (kf_l, qf_r), (qb_l, kb_r) = _halves(level.fwd, m), _halves(level.bwd, m)
        lower, upper = _score_blocks(scores, m)
        lower.copy_((q_r * qf_r) @ (k_l * kf_l).mT)
        upper.copy_((q_l * qb_l) @ (k_r * kb_r).mT)
    return scores


def _scan(updates: Tensor, across: Tensor) -> Tensor:
    """States that enter each chunk, both directions: S_n = across_(n-1) S_(n-1) + updates_(n-1), and mirrored.

    updates and result [N, B*h, 2K, V], across [N, B*h, 2K]: the forward scan's K first.
    """
    states = torch.empty_like(updates)
    N, K = len(updates), updates.shape[-2] // 2
    fwd, bwd = slice(0, K), slice(K, 2 * K)
    states[0, :, fwd] = 0
    states[-1, :, bwd] = 0
    gates = across[..., None]
    for n in range(1, N):
        i, j = n - 1, N - n  # the chunk before, in each direction
        torch.addcmul(updates[i, :, fwd], gates[i, :, fwd], states[i, :, fwd], out=states[n, :, fwd])
        torch.addcmul(updates[j, :, bwd], gates[j, :, bwd], states[j, :, bwd], out=states[j - 1, :, bwd])
    return states


def _forward(q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor) -> Tensor:
    levels, whole, across = _decays(log_gate_fwd, log_gate_bwd)
    out = _scores(q, k, levels) @ v
    if len(q) > 1:
        keys = torch.cat((k * whole.k_fwd, k * whole.k_bwd), -1)
        states = _scan(keys.mT @ v, across)
        queries = torch.cat((q * whole.q_fwd, q * whole.q_bwd), -1)
        out += queries @ states
    return out


def _backward(
    q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and both log-gates. A gate's gradient is the sum over the factors that it is part of."""
    levels, whole, across = _decays(log_gate_fwd, log_gate_bwd)
    dv = _scores(q, k, levels).mT @ grad
    dq, dk = torch.zeros_like(q), torch.zeros_like(k)
    # Gradients of the four running sums of _decays, here at the size of a whole chunk.
    sums = [torch.zeros_like(q) for _ in range(4)]
    dprefix_f, dsuffix_f, dsuffix_b, dprefix_b = sums
    if len(q) > 1:
        K = q.shape[-1]
        keys = torch.cat((k * whole.k_fwd, k * whole.k_bwd), -1)
        queries = torch.cat((q * whole.q_fwd, q * whole.q_bwd), -1)
        states = _scan(keys.mT @ v, across)
        dupdates = _scan_adjoint(queries.mT @ grad, across)
        dqueries, dkeys = grad @ states.mT, v @ dupdates.mT
        dv += keys @ dupdates
        dq += dqueries[..., :K] * whole.q_fwd + dqueries[..., K:] * whole.q_bwd
        dk += dkeys[..., :K] * whole.k_fwd + dkeys[..., K:] * whole.k_bwd
        dqueries *= queries
        dkeys *= keys
        dprefix_f += dqueries[..., :K]
        dsuffix_b += dqueries[..., K:]
        dsuffix_f += dkeys[..., :K]
        dprefix_b += dkeys[..., K:]
        dacross = (dupdates * states).sum(-1) * across  # [N, B*h, 2K]
        dprefix_f[..., -1, :] += dacross[..., :K]
        dsuffix_b[..., 0, :] += dacross[..., K:]
    dscores = grad @ v.mT
    diagonal = 2 * dscores.diagonal(dim1=-2, dim2=-1)[..., None]
    dq.addcmul_(diagonal, k)
    dk.addcmul_(diagonal, q)
    for i in reversed(range(len(levels))):
        _level_backward(2**i, levels[i], q, k, dscores, dq, dk, sums)
    return dq, dk, dv, dprefix_f, dsuffix_b


def _scan_adjoint(dstates: Tensor, across: Tensor) -> Tensor:
    """Gradient of the updates of :func:`_scan`: the same recurrence, each direction walked the other way."""
    K = across.shape[-1] // 2
    swapped = _scan(dstates.roll(K, -2), across.roll(K, -1))
    return swapped.roll(K, -2)


def _level_backward(
    m: int, level: _Level, q: Tensor, k: Tensor, dscores: Tensor, dq: Tensor, dk: Tensor, sums: list[Tensor]
) -> None:
    """Add one level's share to dq, dk and the gradients of the running sums, which it takes from size 2m to m."""
    dprefix_f, dsuffix_f, dsuffix_b, dprefix_b = sums
    (dpf_l, dpf_r), (dsf_l, _) = _halves(dprefix_f, m), _halves(dsuffix_f, m)
    (dsb_l, dsb_r), (_, dpb_r) = _halves(dsuffix_b, m), _halves(dprefix_b, m)
    # The totals that each half took from its neighbour.
    dpf_l[..., -1, :] += dpf_r.sum(-2)
    dpf_r[..., -1, :] += dsf_l.sum(-2)
    dsb_r[..., 0, :] += dsb_l.sum(-2)
    dsb_l[..., 0, :] += dpb_r.sum(-2)

    (q_l, q_r), (k_l, k_r) = _halves(q, m), _halves(k, m)
    (dq_l, dq_r), (dk_l, dk_r) = _halves(dq, m), _halves(dk, m)
    (kf_l, qf_r), (qb_l, kb_r) = _halves(level.fwd, m), _halves(level.bwd, m)
    dlower, dupper = _score_blocks(dscores, m)
    for dblock, q_half, k_half, q_decay, k_decay, dq_half, dk_half, dq_sum, dk_sum in (
        (dlower, q_r, k_l, qf_r, kf_l, dq_r, dk_l, dpf_r, dsf_l),
        (dupper, q_l, k_r, qb_l, kb_r, dq_l, dk_r, dsb_l, dpb_r),
    ):
        dquery = dblock @ (k_half * k_decay)
        dquery *= q_decay
        dkey = dblock.mT @ (q_half * q_decay)
        dkey *= k_decay
        dq_half += dquery
        dk_half += dkey
        dq_sum += dquery.mul_(q_half)
        dk_sum += dkey.mul_(k_half)
