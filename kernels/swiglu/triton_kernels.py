"""Triton kernels of the gated linear layer.

`forward` interleaves the rows of both halves of the weight: the matrix unit gets one product as wide as two, and both
numbers of a pair end up in one thread, which multiplies them where they are.
"""

import triton
import triton.language as tl

from ..launch import INTERPRETED

# Triton's interpreter does not multiply bfloat16: there the same numbers are float32.
WIDEN = tl.constexpr(INTERPRETED)


@triton.jit
def _place(M, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """First row and column of a program, its rows, its columns, which of both exist.

    The next program has the next columns: those that run at a time find rows, and the whole weight, in the L2 cache.
    """
    blocks = tl.cdiv(D, BN)
    top, left = (tl.program_id(0) // blocks).to(tl.int64) * BM, tl.program_id(0) % blocks * BN
    rows, cols = top + tl.arange(0, BM), left + tl.arange(0, BN)
    return left, rows, cols, (rows < M)[:, None] & (cols < D)[None, :]


@triton.jit
def _load(pointers, depth, C: tl.constexpr, BK: tl.constexpr):
    """Zeros from depth C on."""
    if C % BK == 0:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=depth < C, other=0.0)
    return x.to(tl.float32) if WIDEN else x


@triton.jit(do_not_specialize=["M"])
def forward(
    x, weight, out, M, x_m,
    C: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [M, D] = SiLU(x W1^T) * (x W2^T), where x is [M, C] and weight [2 D, C] holds W1, then W2."""
    left, rows, cols, mask = _place(M, D, BM, BN)
    # W1[0], W2[0], W1[1], W2[1], ..; rows past the last one are that one again, and their sums are never stored.
    pairs = tl.arange(0, 2 * BN)
    weight += (tl.minimum(left + pairs // 2, D - 1) + pairs % 2 * D)[None, :] * C
    x += tl.minimum(rows, M - 1)[:, None] * x_m
    sums = tl.zeros([BM, 2 * BN], tl.float32)
    for first in range(0, C, BK):
        depth = first + tl.arange(0, BK)
        a = _load(x + depth[None, :], depth[None, :], C, BK)
        b = _load(weight + depth[:, None], depth[:, None], C, BK)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    gate, value = tl.split(tl.reshape(sums, [BM, BN, 2]))
    y = gate * tl.sigmoid(gate) * value
    tl.store(out + rows[:, None] * D + cols[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def gradient(h, dout, M, d_m, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """h [M, 2 D], gates and values, becomes its own gradient, from that of SiLU(gate) * value, `dout` [M, D]."""
    _, rows, cols, mask = _place(M, D, BM, BN)
    h += rows[:, None] * (2 * D) + cols[None, :]
    gate = tl.load(h, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(h + D, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dout + rows[:, None] * d_m + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    slope = tl.sigmoid(gate)
    tl.store(h, (dy * value * slope * (1 + gate * (1 - slope))).to(h.dtype.element_ty), mask=mask)
    tl.store(h + D, (dy * gate * slope).to(h.dtype.element_ty), mask=mask)
