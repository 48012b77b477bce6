"""Triton kernels of the residual sum and its normalisation. A program takes ROWS tokens of C channels at once."""

import triton
import triton.language as tl


@triton.jit
def _load_channels(base, cols, C: tl.constexpr):
    return tl.load(base + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _normalise(x, mask, eps, C: tl.constexpr, CENTRED: tl.constexpr):
    """(x - mean) / sqrt(variance + eps), or x / sqrt(mean(x^2) + eps), and the inverse root."""
    if CENTRED:
        x = tl.where(mask, x - tl.sum(x, 1)[:, None] / C, 0.0)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / C + eps)[:, None]
    return x * inverse, inverse


@triton.jit(do_not_specialize=["count"])
def forward(
    x, branch, weight, bias, y, total, count, eps, C: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """total = x + branch, y = norm(total); without a branch y = norm(x)."""
    rows, cols = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, BC)
    mask = (rows < count)[:, None] & (cols < C)[None, :]
    at = rows[:, None] * C + cols[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if branch is not None:
        value += tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty)
        tl.store(total + at, value, mask=mask)
        value = value.to(tl.float32)
    normed, _ = _normalise(value, mask, eps, C, bias is not None)
    normed *= _load_channels(weight, cols, C)
    if bias is not None:
        normed += _load_channels(bias, cols, C)
    tl.store(y + at, normed.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def backward(
    total, weight, dy, dtotal, dx, dbranch, dweights, count, eps,
    C: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """dx = dtotal + the gradient through norm(total); the same, of another type, to dbranch.

    dweights [programs, 2, C]: what each program's rows add to the gradients of weight and bias (CENTRED).
    """
    cols = tl.arange(0, BC)
    w = _load_channels(weight, cols, C)
    dweight, dbias = tl.zeros([ROWS, BC], tl.float32), tl.zeros([ROWS, BC], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(count, ROWS), tl.num_programs(0)):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < count)[:, None] & (cols < C)[None, :]
        at = rows[:, None] * C + cols[None, :]
        normed, inverse = _normalise(tl.load(total + at, mask=mask, other=0.0).to(tl.float32), mask, eps, C, CENTRED)
        dy_i = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        d = dy_i * w
        grad = d - normed * (tl.sum(d * normed, 1) / C)[:, None]
        if CENTRED:
            grad -= (tl.sum(d, 1) / C)[:, None]
            dbias += dy_i
        grad *= inverse
        if dtotal is not None:
            grad += tl.load(dtotal + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=mask)
        if dbranch is not None:
            tl.store(dbranch + at, grad.to(dbranch.dtype.element_ty), mask=mask)
        dweight += dy_i * normed
    dweights += tl.program_id(0) * 2 * C
    tl.store(dweights + cols, tl.sum(dweight, 0), mask=cols < C)
    if CENTRED:
        tl.store(dweights + C + cols, tl.sum(dbias, 0), mask=cols < C)
