"""What the kernels share: products on the matrix unit, and loading a chunk."""

import triton
import triton.language as tl

from ...launch import INTERPRETED

LOG2_E = tl.constexpr(1.4426950408889634)
# e to anything below is 0 in float32; keeps sums of the most negative floats finite. Exact in bfloat16.
CLOSED = tl.constexpr(-512.0)


# ---------------------------------------------------------------------------------------------------------------------
# Products. The matrix unit multiplies bfloat16 exactly and adds in float32, so a float32 operand goes in as the sum of
# 1, 2 or 3 bfloat16 terms (8, 16 or 24 bits). Sums over tokens are products with a matrix of 0 and 1.


@triton.jit
def dot(a, b, A_TERMS: tl.constexpr, B_TERMS: tl.constexpr):
    """a b with a in A_TERMS and b in B_TERMS terms, those products left out that are too small to matter."""
    if A_TERMS == 1:
        a_1 = a.to(tl.bfloat16)
    else:
        a_1, a_2, a_3 = _split(a.to(tl.float32), A_TERMS)
    if B_TERMS == 1:
        b_1 = b.to(tl.bfloat16)
    else:
        b_1, b_2, b_3 = _split(b.to(tl.float32), B_TERMS)
    c = _dot_add(tl.zeros([a.shape[0], b.shape[1]], tl.float32), a_1, b_1)
    if A_TERMS > 1:
        c = _dot_add(c, a_2, b_1)
    if B_TERMS > 1:
        c = _dot_add(c, a_1, b_2)
    if A_TERMS > 2:
        c = _dot_add(c, a_3, b_1)
    if B_TERMS > 2:
        c = _dot_add(c, a_1, b_3)
    if (A_TERMS > 2) & (B_TERMS > 2):
        c = _dot_add(c, a_2, b_2)
    return c


@triton.jit
def _split(x, TERMS: tl.constexpr):
    """Two or three bfloat16 terms that add up to x: the upper half of its bits, then what is left."""
    high = _upper_half(x)
    low = x - high
    if TERMS == 2:
        middle = low
    else:
        middle = _upper_half(low)
    return high.to(tl.bfloat16), middle.to(tl.bfloat16), (low - middle).to(tl.bfloat16)


@triton.jit
def _upper_half(x):
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def narrow(x, TERMS: tl.constexpr):
    """x in as few bits as TERMS terms allow."""
    return x.to(tl.bfloat16) if TERMS == 1 else x


# Triton's interpreter does not multiply bfloat16: there the same numbers are float32.
OPERAND = tl.constexpr(tl.float32 if INTERPRETED else tl.bfloat16)


@triton.jit
def _dot_add(c, a, b):
    return tl.dot(a.to(OPERAND), b.to(OPERAND), c)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


@triton.constexpr_function
def _is_ragged(size, block):
    """Whether the last block of several is not full."""
    return size % block != 0


@triton.jit
def load(base, rows, cols, stride, row_ok, SIZE: tl.constexpr):
    """[rows, cols], a tile of the columns; zeros in rows that are not ok and in columns from SIZE on."""
    if _is_ragged(SIZE, cols.shape[0]):
        mask = row_ok[:, None] & (cols < SIZE)[None, :]
    else:
        mask = row_ok[:, None]
    return tl.load(base + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def load_transposed(base, rows, cols, stride, row_ok, SIZE: tl.constexpr):
    """[cols, rows] of what `load` takes."""
    if _is_ragged(SIZE, cols.shape[0]):
        mask = row_ok[None, :] & (cols < SIZE)[:, None]
    else:
        mask = row_ok[None, :]
    return tl.load(base + rows[None, :] * stride + cols[:, None], mask=mask, other=0.0)


@triton.jit
def store(base, rows, cols, stride, row_ok, SIZE: tl.constexpr, x):
    if _is_ragged(SIZE, cols.shape[0]):
        mask = row_ok[:, None] & (cols < SIZE)[None, :]
    else:
        mask = row_ok[:, None]
    tl.store(base + rows[:, None] * stride + cols[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_state(base, cols, vcols, K: tl.constexpr, V: tl.constexpr):
    """A tile of a state [K, V]."""
    return load(base, cols, vcols, V, cols < K, V)


@triton.jit
def is_token(local, first, L, sizes, b, width, HAS_SIZES: tl.constexpr):
    """Which rows of a chunk are tokens: not past the end and, with sizes, inside the valid rectangle of their image."""
    ok = local < L - first
    if HAS_SIZES:
        rows = first + local
        ok = ok & (rows // width < tl.load(sizes + 2 * b)) & (rows % width < tl.load(sizes + 2 * b + 1))
    return ok


@triton.jit
def locate(slot, N, h, L, sizes, width, C: tl.constexpr, HAS_SIZES: tl.constexpr):
    """Image, chunk and head of a slot (heads are neighbours); the chunk's first token, its rows, which are tokens."""
    b, n, head = (slot // (N * h)).to(tl.int64), (slot // h) % N, slot % h
    first, local = n * C, tl.arange(0, C)
    return b, n, head, first, local, is_token(local, first, L, sizes, b, width, HAS_SIZES)


@triton.jit
def at(base, b, head, first, stride_b, stride_h, stride_l):
    """Where the numbers of token `first` lie."""
    return base + b * stride_b + head * stride_h + first.to(tl.int64) * stride_l


@triton.jit
def load_gates(base, rows, cols, stride, row_ok, SIZE: tl.constexpr):
    """Log-gates, closed ones finite; open (0) where `load` gives zeros."""
    return tl.maximum(load(base, rows, cols, stride, row_ok, SIZE).to(tl.float32), CLOSED)


@triton.jit
def log_sigmoid(x):
    """log(1 / (1 + exp(-x))), to float32's relative precision also where it is nearly 0."""
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    # log(1 + e) / e on [0, 1] to 3e-8, a least-squares fit of the relative error with weights that level it
    p = -0.0295052325 + e * 0.0052326927
    p = -0.136632449 + e * (0.0782259417 + e * p)
    p = -0.248429821 + e * (0.191060064 + e * p)
    p = -0.499994931 + e * (0.333190968 + e * p)
    return tl.minimum(x, 0.0) - e * (0.99999997 + e * p)


@triton.jit
def load_segments(segments, local, first, L, C: tl.constexpr):
    """Sequence numbers of the rows, of the tokens before and after the chunk and of its first and last token."""
    last = tl.minimum(first + C, L) - 1
    own = tl.load(segments + first + local, mask=local < L - first, other=-3)
    before = tl.load(segments + first - 1, mask=first > 0, other=-1)
    after = tl.load(segments + last + 1, mask=last + 1 < L, other=-2)
    return own, before, after, tl.load(segments + first), tl.load(segments + last)


@triton.jit
def decaying(segments, local, first, L, own, row_ok):
    """Rows whose forward, and whose backward, gate decays anything: those with a neighbour in their own sequence."""
    in_row = local < L - first
    previous = tl.load(segments + first + local - 1, mask=in_row & (first + local > 0), other=-1)
    following = tl.load(segments + first + local + 1, mask=local + 1 < L - first, other=-2)
    return row_ok & (own == previous), row_ok & (own == following)
