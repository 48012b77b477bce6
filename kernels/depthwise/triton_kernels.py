"""Triton kernels of the depthwise convolution.

A program takes BW columns and BC channels of one image and walks down a strip of rows, each of which it loads once, at
three column offsets, and AHEAD rows before its use. Two of the three loads find their numbers in the L1 cache. Hence
they go to registers: a pipelined loop of Triton's would copy all three from the L2 cache to shared memory.

A row takes part in three rows of the result; two of them wait unfinished for the rows to come.

Of padded images, `valid` [B, 2] are rows and columns, H and W where there is none.
"""

import triton
import triton.language as tl


@triton.jit
def _place(W, C, rows, strips, BW: tl.constexpr, BC: tl.constexpr):
    """Number of the tile, image, first row, columns, channels of a program; the next one has the next channels."""
    tile, channel_block = tl.program_id(0) // tl.cdiv(C, BC), tl.program_id(0) % tl.cdiv(C, BC)
    strip, col_block = tile // tl.cdiv(W, BW), tile % tl.cdiv(W, BW)
    cols, channels = col_block * BW + tl.arange(0, BW), channel_block * BC + tl.arange(0, BC)
    return tile, (strip // strips).to(tl.int64), strip % strips * rows, cols, channels


@triton.jit
def _offsets(cols, channels, s_w):
    return cols[:, None].to(tl.int64) * s_w + channels[None, :]


@triton.jit
def _mask(cols, channels, W, C):
    return (cols < W)[:, None] & (channels < C)[None, :]


@triton.jit
def _valid_size(valid, image, H, W):
    if valid is not None:
        H, W = tl.load(valid + 2 * image).to(tl.int32), tl.load(valid + 2 * image + 1).to(tl.int32)
    return H, W


@triton.jit
def _clear_padding(y, valid, row, cols, h, w):
    """A row of the result; zeros beyond h rows and w columns."""
    if valid is not None:
        y = tl.where((cols < tl.where(row < h, w, 0))[:, None], y, 0.0)
    return y


@triton.jit
def _load_row(row, at, s_w, cols, channels, W, C):
    """Its numbers one column to the left, in place, one column to the right; zeros beyond W columns."""
    inside = _mask(cols, channels, W, C)
    left = tl.load(row - s_w + at, mask=inside & (cols > 0)[:, None], other=0.0)
    middle = tl.load(row + at, mask=inside, other=0.0)
    right = tl.load(row + s_w + at, mask=inside & (cols + 1 < W)[:, None], other=0.0)
    return left, middle, right


@triton.jit
def _load_first_rows(row, s_h, at, s_w, cols, channels, first, H, W, C, AHEAD: tl.constexpr):
    """Rows `first`, `first` + 1, .., to the first of which `row` points; and where the next one is."""
    ahead = ()
    for i in tl.static_range(AHEAD):
        columns = tl.where((first + i >= 0) & (first + i < H), W, 0)
        ahead += (_load_row(row, at, s_w, cols, channels, columns, C),)
        row += s_h
    return ahead, row


@triton.jit
def _append(ahead, row, AHEAD: tl.constexpr):
    """Without the first row, with another one at the end."""
    rest = ()
    for i in tl.static_range(1, AHEAD):
        rest += (ahead[i],)
    return rest + (row,)


@triton.jit
def _in_float32(x):
    return x[0].to(tl.float32), x[1].to(tl.float32), x[2].to(tl.float32)


@triton.jit
def _weight(weight, channels, C, tap: tl.constexpr):
    return tl.load(weight + tap * C + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _weights(weight, channels, C, first: tl.constexpr, step: tl.constexpr):
    """Three neighbours among the nine weights, [9, C]."""
    return (
        _weight(weight, channels, C, first),
        _weight(weight, channels, C, first + step),
        _weight(weight, channels, C, first + 2 * step),
    )


@triton.jit
def _add_row(y, x, w):
    return y + x[0] * w[0] + x[1] * w[1] + x[2] * w[2]


@triton.jit(do_not_specialize=["H", "W", "rows", "strips"])
def convolve(
    x, weight, dout, out, valid, H, W, C, rows, strips, x_b, x_h, x_w, d_b, d_h, d_w,
    ACTIVATION: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """out [B, H, W, C] = conv(x), or SiLU(conv(x)), or, given the gradient `dout` of the latter, that of conv(x)."""
    _, image, top, cols, channels = _place(W, C, rows, strips, BW, BC)
    h, w = _valid_size(valid, image, H, W)
    at, out_at = _offsets(cols, channels, x_w), _offsets(cols, channels, C)
    x += image * x_b + (top - 1).to(tl.int64) * x_h
    out += (image * H + top - 2) * W * C
    if dout is not None:
        dout += image * d_b + (top - 2).to(tl.int64) * d_h
        dout_at = _offsets(cols, channels, d_w)
    ahead, x = _load_first_rows(x, x_h, at, x_w, cols, channels, top - 1, h, w, C, AHEAD)
    upper = _weights(weight, channels, C, 0, 1)
    middle = _weights(weight, channels, C, 3, 1)
    lower = _weights(weight, channels, C, 6, 1)
    zeros = tl.zeros([BW, BC], tl.float32)
    waiting, waiting_longer = zeros, zeros
    for row in range(top - 1, tl.minimum(top + rows, H) + 1):
        here = _in_float32(ahead[0])
        columns = tl.where(row + AHEAD < h, w, 0)
        ahead = _append(ahead, _load_row(x, at, x_w, cols, channels, columns, C), AHEAD)
        x += x_h
        finished = _mask(cols, channels, tl.where(row > top, W, 0), C)
        if dout is not None:
            dy = tl.load(dout + dout_at, mask=finished, other=0.0).to(tl.float32)
            dout += d_h
        y = _add_row(waiting, here, lower)
        waiting = _add_row(waiting_longer, here, middle)
        waiting_longer = _add_row(zeros, here, upper)
        if ACTIVATION:
            slope = tl.sigmoid(y)
            if dout is not None:
                y = dy * slope * (1 + y * (1 - slope))
            else:
                y *= slope
        y = _clear_padding(y, valid, row - 1, cols, h, w)
        tl.store(out + out_at, y.to(out.dtype.element_ty), mask=finished)
        out += W.to(tl.int64) * C


@triton.jit
def _add_products(sums, x, d):
    return sums[0] + x * d[2], sums[1] + x * d[1], sums[2] + x * d[0]


@triton.jit
def _store_sums(dweights, channels, C, sums):
    """Three rows of [9, C]."""
    tl.store(dweights + channels, tl.sum(sums[0], 0), mask=channels < C)
    tl.store(dweights + C + channels, tl.sum(sums[1], 0), mask=channels < C)
    tl.store(dweights + 2 * C + channels, tl.sum(sums[2], 0), mask=channels < C)


@triton.jit(do_not_specialize=["H", "W", "rows", "strips"])
def gradients(
    x, weight, dy, dx, dweights, valid, H, W, C, rows, strips, x_b, x_h, x_w, d_b, d_h, d_w,
    BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """From that of conv(x), `dy`: dx; dweights [tiles, 9, C]: what x in each tile adds to those of the weights.

    dx is the convolution of dy with the weights in reverse order, and the sums need dy where that loads it.
    """
    tile, image, top, cols, channels = _place(W, C, rows, strips, BW, BC)
    h, w = _valid_size(valid, image, H, W)
    bottom = tl.minimum(top + rows, H)
    at, x_at, dx_at = _offsets(cols, channels, d_w), _offsets(cols, channels, x_w), _offsets(cols, channels, C)
    dy += image * d_b + (top - 1).to(tl.int64) * d_h
    x += image * x_b + top.to(tl.int64) * x_h
    dx += (image * H + top - 2) * W * C
    ahead = _load_row(dy, at, d_w, cols, channels, tl.where((top > 0) & (top <= h), w, 0), C)
    x_ahead = tl.load(x + x_at, mask=_mask(cols, channels, tl.where(top < h, w, 0), C), other=0.0)
    upper = _weights(weight, channels, C, 8, -1)
    middle = _weights(weight, channels, C, 5, -1)
    lower = _weights(weight, channels, C, 2, -1)
    zeros = tl.zeros([BW, BC], tl.float32)
    waiting, waiting_longer, x_above, x_here = zeros, zeros, zeros, zeros
    upper_sums, middle_sums, lower_sums = (zeros, zeros, zeros), (zeros, zeros, zeros), (zeros, zeros, zeros)
    for row in range(top - 1, bottom + 1):
        dy += d_h
        x += x_h
        here, x_below = _in_float32(ahead), x_ahead.to(tl.float32)
        ahead = _load_row(dy, at, d_w, cols, channels, tl.where(row + 1 < h, w, 0), C)
        columns = tl.where(row + 2 < tl.minimum(bottom, h), w, 0)
        x_ahead = tl.load(x + x_at, mask=_mask(cols, channels, columns, C), other=0.0)
        y = _add_row(waiting, here, lower)
        waiting = _add_row(waiting_longer, here, middle)
        waiting_longer = _add_row(zeros, here, upper)
        finished = _mask(cols, channels, tl.where(row > top, W, 0), C)
        y = _clear_padding(y, valid, row - 1, cols, h, w)
        tl.store(dx + dx_at, y.to(dx.dtype.element_ty), mask=finished)
        dx += W.to(tl.int64) * C
        upper_sums = _add_products(upper_sums, x_above, here)
        middle_sums = _add_products(middle_sums, x_here, here)
        lower_sums = _add_products(lower_sums, x_below, here)
        # Triton 3.6 loses a carried tensor that is nothing but another one of the iteration before.
        x_above, x_here = tl.where(row >= top, x_here, 0.0), x_below
    dweights += tile.to(tl.int64) * 9 * C
    _store_sums(dweights, channels, C, upper_sums)
    _store_sums(dweights + 3 * C, channels, C, middle_sums)
    _store_sums(dweights + 6 * C, channels, C, lower_sums)
