"""Chunked PyTorch form of bidirectional gated linear attention: any device, exact for every finite gate.

A chunk of C tokens is halved recursively. At half size m, the right half's queries meet the left half's keys (forward
scan) and the left half's queries the right half's keys (backward scan); the decay between two tokens is split at the
boundary between the halves, so that every factor is the exponential of a sum of log-gates on one side of the boundary:
at most 1, never overflowing, and never the difference of two large sums. Both directions fill one C x C score matrix.
From chunk to chunk each direction hands on a state. README.md of this folder derives it, gradients included.

Arrays inside are ``[N*H, C, .]``: N chunks of H = B*h sequences, chunk after chunk. The directions differ in their
roles alone: forward, keys on the left of a boundary meet queries on its right; backward, queries on the left meet keys
on the right. Functions for one direction speak of `left` and `right`, and `reverse` says which is which.

In a graph of torch.compile the forward and the backward pass are one operator each, for any length; torch.export (not
strict) sees through them, and its graph grows with log N.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..arguments import without_autocast

MAX_CHUNK = 64


class _Sums(NamedTuple):
    """Sums of one direction's log-gates inside blocks of tokens, or the gradients of those sums.

    prefix: from the start of the block up to each token, suffix: from each token to the end of the block, [N*H, C, K];
    totals: over each block, [blocks, 1, K].
    """

    prefix: Tensor
    suffix: Tensor
    totals: Tensor


def chunk_bidirectional_gla(
    q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor, scale: float
) -> Tensor:
    """Linear in L in time and memory; computes in float32 (float64 for float64 inputs), whatever autocast says.

    Shapes as in :func:`vig_kernels.bidirectional_gla`, with which the definition (`naive`) it must agree.
    Keeps the inputs for the backward pass and recomputes the rest.
    """
    return _ChunkGLA.apply(q, k, v, log_gate_fwd, log_gate_bwd, scale)


class _ChunkGLA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, log_gate_fwd, log_gate_bwd)
        ctx.scale = scale
        function = _output_operator if torch.compiler.is_dynamo_compiling() else _output
        return function(q, k, v, log_gate_fwd, log_gate_bwd, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        function = _gradients_operator if torch.compiler.is_dynamo_compiling() else _gradients
        return *function(grad_out, *ctx.saved_tensors, ctx.scale), None


def _output(q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor, scale: float) -> Tensor:
    with without_autocast(q):
        chunks = _to_chunks(q, k, v, log_gate_fwd, log_gate_bwd)
        out = _forward(*chunks, H=q.shape[0] * q.shape[2]).mul_(scale / 2)
        return _from_chunks(out, v)


def _gradients(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = q, k, v, log_gate_fwd, log_gate_bwd
    with without_autocast(q):  # backward() may be called inside an autocast region
        *chunks, grad = _to_chunks(*inputs, grad_out)
        grads = _backward(*chunks, grad.mul_(scale / 2), H=q.shape[0] * q.shape[2])
        return tuple(_from_chunks(x, tensor) for x, tensor in zip(grads, inputs))


# What torch.compile puts into its graph. Traced, one call would be 3,000 nodes, minutes of work for Inductor.
@torch.library.custom_op("vig::chunk_bidirectional_gla", mutates_args=())
def _output_operator(
    q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor, scale: float
) -> Tensor:
    return _output(q, k, v, log_gate_fwd, log_gate_bwd, scale).contiguous()


@_output_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor, scale: float) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.custom_op("vig::chunk_bidirectional_gla_backward", mutates_args=())
def _gradients_operator(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = _gradients(grad_out, q, k, v, log_gate_fwd, log_gate_bwd, scale)
    return tuple(grad.contiguous() for grad in grads)


@_gradients_operator.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, log_gate_fwd, log_gate_bwd))


def _chunk_size(L: int) -> int:
    """A power of two up to MAX_CHUNK; halved while that saves an eighth of the padded length or more."""
    size = MAX_CHUNK
    while size > 8 and -L % size >= -L % (size // 2) + (L + -L % size) // 8:
        size //= 2
    return size


def _to_chunks(*tensors: Tensor) -> list[Tensor]:
    """[B, L, h, D] each -> fresh [N*H, C, D] in the computing type, padded with zeros (no key, an open gate)."""
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    B, L, h, _ = tensors[0].shape
    C = _chunk_size(L)
    N = -(-L // C)
    whole = L // C
    chunks = []
    for x in tensors:
        D = x.shape[-1]
        out = torch.empty(N, B, h, C, D, dtype=dtype, device=x.device)
        out[:whole] = x[:, : whole * C].reshape(B, whole, C, h, D).permute(1, 0, 3, 2, 4)
        if whole < N:
            rest = L - whole * C
            out[whole:, :, :, :rest] = x[:, whole * C :].transpose(1, 2)
            out[whole:, :, :, rest:] = 0
        chunks.append(out.view(N * B * h, C, D))
    return chunks


def _from_chunks(x: Tensor, like: Tensor) -> Tensor:
    """[N*H, C, D] -> [B, L, h, D] in the type and shape of `like`."""
    B, L, h, D = like.shape
    C = x.shape[1]
    x = x.view(-1, B, h, C, D).permute(1, 0, 3, 2, 4).reshape(B, -1, h, D)
    return x[:, :L].to(like.dtype)


def _half_sizes(x: Tensor) -> list[int]:
    """1, 2, .. C/2 for [N*H, C, D]."""
    return [2**i for i in range(x.shape[1].bit_length() - 1)]


def _halves(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Left and right halves of each block of 2m tokens, as views [blocks, m, D]."""
    x = x.view(-1, 2, m, x.shape[-1])
    return x.select(1, 0), x.select(1, 1)  # writing to the views of unbind would fix a dynamic length in torch.export


def _score_block(scores: Tensor, m: int, reverse: bool) -> Tensor:
    """One direction's blocks between halves of size m, queries x keys, as a view [N*H, C/2m, m, m] of [N*H, C, C]."""
    n = scores.shape[1] // (2 * m)
    blocks = scores.view(-1, n, 2, m, n, 2, m)
    block = blocks.select(5, 1).select(2, 0) if reverse else blocks.select(5, 0).select(2, 1)
    return block.diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _sums_of_tokens(log_gate: Tensor, reverse: bool) -> _Sums:
    """Sums over blocks of one token. Its own gate decays what reaches the token (its query), but not its key."""
    query, key = log_gate.clone(), torch.zeros_like(log_gate)
    return _Sums(key, query, log_gate) if reverse else _Sums(query, key, log_gate)


def _join_halves(sums: _Sums, m: int) -> tuple[Tensor, _Sums]:
    """From sums over blocks of m tokens to those over blocks of 2m, and the decay to the middle of those.

    Prefix and suffix grow in place, by the total of the neighbour: no sum is ever a difference. The decay is
    [blocks, 2, m, K], halves apart.
    """
    (_, prefix), (suffix, _), (total_l, total_r) = (_halves(x, n) for x, n in zip(sums, (m, m, 1)))
    decay = torch.stack((suffix, prefix), 1).exp_()
    prefix += total_l
    suffix += total_r
    return decay, sums._replace(totals=total_l + total_r)


def _diagonal_scores(q: Tensor, k: Tensor) -> Tensor:
    """The score matrix [N*H, C, C], with its diagonal alone filled; it belongs to both directions."""
    scores = q.new_empty(*q.shape[:2], q.shape[1])
    scores.diagonal(dim1=1, dim2=2).copy_((q * k).sum(-1).mul_(2))
    return scores


def _fill_scores(scores: Tensor, left: Tensor, right: Tensor, decay: Tensor, m: int, reverse: bool) -> None:
    """Write one direction's decayed q k^T between halves of size m."""
    left, right = _halves(left, m)[0] * decay[:, 0], _halves(right, m)[1] * decay[:, 1]
    block = _score_block(scores, m, reverse)
    block.copy_((torch.bmm(left, right.mT) if reverse else torch.bmm(right, left.mT)).view(block.shape))


def _scan_(x: Tensor, links: Tensor, reverse: bool) -> Tensor:
    """In place, one after the other, ``x[i + 1] += links[i] * x[i]``; if reverse, ``x[i] += links[i] * x[i + 1]``.

    x [n, H, K, V], links [n-1, H, K]. Brent and Kung's scan: neighbours join in pairs, the far ends of the pairs are
    scanned likewise, and the elements between two ends take from the end before them. Links are at most 1, and so are
    their products.
    """
    n = x.shape[0]
    if n > 1 and reverse:
        ends = x[::2].clone()
        ends[: n // 2].addcmul_(links[::2, :, :, None], x[1::2])
        x[::2] = _scan_(ends, links[:-1:2] * links[1::2], reverse)
        x[1:-1:2].addcmul_(links[1::2, :, :, None], x[2::2])
    elif n > 1:
        ends = torch.addcmul(x[1::2], links[::2, :, :, None], x[:-1:2])
        x[1::2] = _scan_(ends, links[1:-1:2] * links[2::2], reverse)
        x[2::2].addcmul_(links[1::2, :, :, None], x[1:-1:2])
    return x


def _states(x: Tensor, y: Tensor, links: Tensor, reverse: bool) -> Tensor:
    """What each chunk hands on, [(N-1)*H, K, V]: its own x^T y, and what it received, decayed by its links."""
    states = torch.bmm(x.mT, y)
    _scan_(states.view(-1, *links.shape[1:], y.shape[-1]), links, reverse)
    return states


def _passage(left: Tensor, right: Tensor, sums: _Sums, H: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Decay between chunks, of which each one but the last is on the left, each one but the first on the right.

    Returns the factors of left and right, `left` and `right` decayed by them, [(N-1)*H, C, K] each, and the links: the
    decay across chunks that are both, [N-2, H, K].
    """
    suffix, prefix = sums.suffix[:-H].exp(), sums.prefix[H:].exp()
    links = sums.totals[H:-H].view(-1, H, left.shape[-1]).exp()
    return suffix, prefix, left[:-H] * suffix, right[H:] * prefix, links


def _forward(q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor, H: int) -> Tensor:
    out, scores = torch.zeros_like(v), _diagonal_scores(q, k)
    _direction(k, q, v, log_gate_fwd, out, scores, H, reverse=False)
    _direction(q, k, v, log_gate_bwd, out, scores, H, reverse=True)
    return out.baddbmm_(scores, v)


def _direction(
    left: Tensor, right: Tensor, v: Tensor, log_gate: Tensor, out: Tensor, scores: Tensor, H: int, reverse: bool
) -> None:
    """Fill one direction's part of the scores; add to out what comes from other chunks."""
    sums = _sums_of_tokens(log_gate, reverse)
    for m in _half_sizes(left):
        decay, sums = _join_halves(sums, m)
        _fill_scores(scores, left, right, decay, m, reverse)
    if v.shape[0] > H:
        _, _, left, right, links = _passage(left, right, sums, H)
        if reverse:
            out[:-H].baddbmm_(left, _states(right, v[H:], links, reverse))
        else:
            out[H:].baddbmm_(right, _states(left, v[:-H], links, reverse))


def _backward(
    q: Tensor, k: Tensor, v: Tensor, log_gate_fwd: Tensor, log_gate_bwd: Tensor, grad: Tensor, H: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and both log-gates. A gate's gradient is the sum over the factors that it is part of."""
    dv, scores = torch.zeros_like(v), _diagonal_scores(q, k)
    dscores = torch.bmm(grad, v.mT)
    diagonal = 2 * dscores.diagonal(dim1=1, dim2=2)[..., None]
    dq, dk = diagonal * k, diagonal * q
    dfwd = _direction_backward(k, q, v, log_gate_fwd, grad, scores, dscores, dk, dq, dv, H, reverse=False)
    dbwd = _direction_backward(q, k, v, log_gate_bwd, grad, scores, dscores, dq, dk, dv, H, reverse=True)
    return dq, dk, dv.baddbmm_(scores.mT, grad), dfwd, dbwd


def _direction_backward(
    left: Tensor,
    right: Tensor,
    v: Tensor,
    log_gate: Tensor,
    grad: Tensor,
    scores: Tensor,
    dscores: Tensor,
    dleft: Tensor,
    dright: Tensor,
    dv: Tensor,
    H: int,
    reverse: bool,
) -> Tensor:
    """Gradient of one direction's log-gates. Fills its part of the scores; adds its shares to dleft, dright and dv."""
    sums = _sums_of_tokens(log_gate, reverse)
    decays = []
    for m in _half_sizes(left):
        decay, sums = _join_halves(sums, m)
        _fill_scores(scores, left, right, decay, m, reverse)
        decays.append(decay)
    dsums = _Sums(*(torch.zeros_like(x) for x in sums))
    if v.shape[0] > H:
        _passage_backward(left, right, v, grad, sums, dleft, dright, dv, dsums, H, reverse)
    for m, decay in zip(reversed(_half_sizes(left)), reversed(decays)):
        dsums = _level_backward(m, decay, left, right, dscores, dleft, dright, dsums, reverse)
    own = dsums.suffix if reverse else dsums.prefix
    return own.add_(dsums.totals.view(own.shape))


def _passage_backward(
    left: Tensor,
    right: Tensor,
    v: Tensor,
    grad: Tensor,
    sums: _Sums,
    dleft: Tensor,
    dright: Tensor,
    dv: Tensor,
    dsums: _Sums,
    H: int,
    reverse: bool,
) -> None:
    """Add to the gradients what passes between chunks.

    `from_left` are the states, and `from_right` their gradients; the other way round if reverse.
    """
    suffix, prefix, left, right, links = _passage(left, right, sums, H)
    y_left, y_right = (grad[:-H], v[H:]) if reverse else (v[:-H], grad[H:])
    from_left, from_right = _states(left, y_left, links, False), _states(right, y_right, links, True)
    if reverse:
        dv[H:].baddbmm_(right, from_left)
    else:
        dv[:-H].baddbmm_(left, from_right)
    d = torch.bmm(y_left, from_right.mT)
    dleft[:-H] += suffix.mul_(d)
    dsums.suffix[:-H] += d.mul_(left)
    d = torch.bmm(y_right, from_left.mT)
    dright[H:] += prefix.mul_(d)
    dsums.prefix[H:] += d.mul_(right)
    dlinks = (from_left[:-H] * from_right[H:]).sum(-1)
    dsums.totals[H:-H, 0] += dlinks.mul_(links.view(dlinks.shape))


def _level_backward(
    m: int,
    decay: Tensor,
    left: Tensor,
    right: Tensor,
    dscores: Tensor,
    dleft: Tensor,
    dright: Tensor,
    dsums: _Sums,
    reverse: bool,
) -> _Sums:
    """Add the shares of half size m to dleft and dright; take the sums' gradients from blocks of 2m to those of m."""
    (_, dprefix), (dsuffix, _) = _halves(dsums.prefix, m), _halves(dsums.suffix, m)
    # The totals that each half gave to its neighbour, and those of the whole block.
    dtotal_l, dtotal_r = dsums.totals + dprefix.sum(1, keepdim=True), dsums.totals + dsuffix.sum(1, keepdim=True)
    dtotals = torch.stack((dtotal_l, dtotal_r), 1).flatten(0, 1)

    (left, _), (_, right), (dleft, _), (_, dright) = (_halves(x, m) for x in (left, right, dleft, dright))
    decay_l, decay_r = decay[:, 0], decay[:, 1]
    dblock = _score_block(dscores, m, reverse).reshape(-1, m, m)
    dblock = dblock.mT if reverse else dblock  # right x left
    for d, x, factor, dx, dsum in (
        (torch.bmm(dblock.mT, right * decay_r), left, decay_l, dleft, dsuffix),
        (torch.bmm(dblock, left * decay_l), right, decay_r, dright, dprefix),
    ):
        d *= factor
        dx += d
        dsum += d.mul_(x)
    return dsums._replace(totals=dtotals)
