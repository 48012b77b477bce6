"""Triton kernels of gating locality injection.

A row is one head of one token, V numbers; a program takes ROWS of them at once.
"""

import triton
import triton.language as tl


@triton.jit
def _load(base, batch, token, head, cols, s_b, s_l, s_h, mask):
    """[ROWS, V] in float32; zeros where the mask says no."""
    offsets = batch * s_b + token * s_l + head * s_h
    return tl.load(base + offsets[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _place(rows, L, h):
    """Image, token and head of rows."""
    return (rows // (L * h)).to(tl.int64), ((rows // h) % L).to(tl.int64), rows % h


@triton.jit
def _load_gate(logits, gate_bias, batch, token, head, cols, s_b, s_l, s_h, mask, V: tl.constexpr):
    x = _load(logits, batch, token, head, cols, s_b, s_l, s_h, mask)
    if gate_bias is not None:
        x += tl.load(gate_bias + head[:, None] * V + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.sigmoid(x)


@triton.jit
def _norm(x, eps, V: tl.constexpr):
    """x / sqrt(mean(x^2) + eps) and the inverse root."""
    inverse = tl.rsqrt(tl.sum(x * x, 1) / V + eps)[:, None]
    return x * inverse, inverse


@triton.jit
def _norm_gradient(dy, weight, normed, inverse, V: tl.constexpr):
    """The gradient of x from that of y = weight * norm(x)."""
    d = dy * weight
    return inverse * (d - normed * (tl.sum(d * normed, 1) / V)[:, None])


@triton.jit(do_not_specialize=["L", "count"])
def forward(
    scan, local, logits, gate_bias, scan_weight, local_weight, out, L, h, count, eps,
    s_b, s_l, s_h, u_b, u_l, u_h, g_b, g_l, g_h,
    V: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """out [count, V] = mix of the normed scan and the normed local branch."""
    rows, cols = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, BV)
    batch, token, head = _place(rows, L, h)
    mask = (rows < count)[:, None] & (cols < V)[None, :]
    weight_s = tl.load(scan_weight + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    weight_u = tl.load(local_weight + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    s, _ = _norm(_load(scan, batch, token, head, cols, s_b, s_l, s_h, mask), eps, V)
    u, _ = _norm(_load(local, batch, token, head, cols, u_b, u_l, u_h, mask), eps, V)
    gate = _load_gate(logits, gate_bias, batch, token, head, cols, g_b, g_l, g_h, mask, V)
    y = u * weight_u
    y += gate * (s * weight_s - y)
    if ACTIVATION:
        y *= tl.sigmoid(y)
    tl.store(out + rows[:, None] * V + cols[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["L", "count"])
def backward(
    scan, local, logits, gate_bias, scan_weight, local_weight, dout, dscan, dlocal, dlogits, dweights, L, h, count, eps,
    s_b, s_l, s_h, u_b, u_l, u_h, g_b, g_l, g_h, d_b, d_l, d_h,
    V: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Gradients of all inputs; dweights [programs, 2, V]: what each program's rows add to those of the weights."""
    cols = tl.arange(0, BV)
    weight_s = tl.load(scan_weight + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    weight_u = tl.load(local_weight + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    dweight_s, dweight_u = tl.zeros([ROWS, BV], tl.float32), tl.zeros([ROWS, BV], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(count, ROWS), tl.num_programs(0)):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        batch, token, head = _place(rows, L, h)
        mask = (rows < count)[:, None] & (cols < V)[None, :]
        s, inverse_s = _norm(_load(scan, batch, token, head, cols, s_b, s_l, s_h, mask), eps, V)
        u, inverse_u = _norm(_load(local, batch, token, head, cols, u_b, u_l, u_h, mask), eps, V)
        gate = _load_gate(logits, gate_bias, batch, token, head, cols, g_b, g_l, g_h, mask, V)
        dy = _load(dout, batch, token, head, cols, d_b, d_l, d_h, mask)
        difference = s * weight_s - u * weight_u
        if ACTIVATION:
            y = u * weight_u + gate * difference
            slope = tl.sigmoid(y)
            dy *= slope * (1 + y * (1 - slope))
        ds, du = dy * gate, dy * (1 - gate)
        at = rows[:, None] * V + cols[None, :]
        dlogit = dy * difference * gate * (1 - gate)
        tl.store(dlogits + at, dlogit.to(dlogits.dtype.element_ty), mask=mask)
        dx = _norm_gradient(ds, weight_s, s, inverse_s, V)
        tl.store(dscan + at, dx.to(dscan.dtype.element_ty), mask=mask)
        dx = _norm_gradient(du, weight_u, u, inverse_u, V)
        tl.store(dlocal + at, dx.to(dlocal.dtype.element_ty), mask=mask)
        dweight_s += ds * s
        dweight_u += du * u
    dweights += tl.program_id(0) * 2 * V
    tl.store(dweights + cols, tl.sum(dweight_s, 0), mask=cols < V)
    tl.store(dweights + V + cols, tl.sum(dweight_u, 0), mask=cols < V)
