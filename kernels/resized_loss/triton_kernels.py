"""Triton kernels of the loss.

Both make the logits of full resolution where they need them and keep them nowhere. `forward` goes over the pixels of
the labels; `backward` over those of the logits, and sums up what every pixel of the labels nearby wants of it: no
atomics, the same sum every time. The logits that such a pixel is interpolated from are that source and its eight
neighbours, which a program holds in registers.
"""

import triton
import triton.language as tl

from ..online_softmax import LOWEST, merge_slots


@triton.jit
def _source(position, size, scale, ALIGN: tl.constexpr):
    """Of pixels of the labels: the source before it, and the share of the one after that."""
    if ALIGN:
        source = position * scale
    else:
        source = tl.maximum((position + 0.5) * scale - 0.5, 0.0)
    first = tl.minimum(source.to(tl.int32), size - 1)
    return first, tl.where(first < size - 1, source - first, 0.0)


@triton.jit
def _first_pixel(source, stretch, ALIGN: tl.constexpr):
    """The first pixel of the labels whose interpolation may need a source; `stretch` is 1 / scale."""
    if ALIGN:
        last_without = (source - 1.0) * stretch
    else:
        last_without = (source - 0.5) * stretch - 0.5
    return tl.maximum(tl.floor(last_without).to(tl.int32) + 1, 0)


@triton.jit(do_not_specialize=["l_c", "l_y", "h", "w", "H", "W", "ignore"])
def forward(
    logits, labels, loss, hits, norm, l_b, l_c, l_y, h, w, H, W, scale_y, scale_x, ignore,
    C: tl.constexpr, ALIGN: tl.constexpr, BC: tl.constexpr, BX: tl.constexpr,
):  # fmt: skip
    """loss, hits and norm (logsumexp) [B, H, W], from logits [B, C, h, w] and labels [B, H, W]."""
    blocks = tl.cdiv(W, BX)
    row = tl.program_id(0) // blocks  # of all images
    x = tl.program_id(0) % blocks * BX + tl.arange(0, BX)
    exists = x < W
    top, below = _source(row % H, h, scale_y, ALIGN)
    left, right = _source(tl.minimum(x, W - 1), w, scale_x, ALIGN)
    logits += (row // H).to(tl.int64) * l_b
    upper, lower = top * l_y, tl.minimum(top + 1, h - 1) * l_y
    after = tl.minimum(left + 1, w - 1)
    pixels = row.to(tl.int64) * W + x
    label = tl.load(labels + pixels, mask=exists, other=0).to(tl.int32)

    # Of every slot of the tile: each BC-th class.
    largest = tl.full([BC, BX], LOWEST, tl.float32)
    total = tl.zeros([BC, BX], tl.float32)
    of_label = tl.zeros([BC, BX], tl.float32)
    winner = tl.zeros([BC, BX], tl.int32)
    for first in range(0, C, BC):
        c = (first + tl.arange(0, BC))[:, None]
        plane = logits + c.to(tl.int64) * l_c
        is_class = c < C
        z = tl.load(plane + (upper + left)[None, :], mask=is_class, other=0.0).to(tl.float32)
        z_next = tl.load(plane + (upper + after)[None, :], mask=is_class, other=0.0).to(tl.float32)
        z_below = tl.load(plane + (lower + left)[None, :], mask=is_class, other=0.0).to(tl.float32)
        z_next_below = tl.load(plane + (lower + after)[None, :], mask=is_class, other=0.0).to(tl.float32)
        z += (z_below - z) * below
        z_next += (z_next_below - z_next) * below
        z = tl.where(is_class, z + (z_next - z) * right[None, :], float("-inf"))
        of_label += tl.where(c == label[None, :], z, 0.0)
        winner = tl.where(z > largest, c, winner)
        before, largest = largest, tl.maximum(largest, z)
        total = total * tl.exp(before - largest) + tl.exp(z - largest)
    most, total, best = merge_slots(largest, total, winner, C)
    log_sum = tl.log(total)
    counts = label != ignore
    tl.store(loss + pixels, tl.where(counts, most - tl.sum(of_label, 0) + log_sum, 0.0), mask=exists)
    tl.store(hits + pixels, (best == label) & counts, mask=exists)
    tl.store(norm + pixels, most + log_sum, mask=exists)


@triton.jit
def _shares(first, share, source):
    """What an interpolation, by its first source and the share of the next, takes of a source, before, at and after."""
    at, before = first == source, first == source - 1
    return (
        tl.where(before, 1 - share, 0.0),
        tl.where(at, 1 - share, tl.where(before, share, 0.0)),
        tl.where(at, share, 0.0),
    )


@triton.jit(
    do_not_specialize=["l_c", "l_y", "g_y", "g_x", "h", "w", "H", "W", "steps_y", "steps_x", "ignore"],
)
def backward(
    logits, labels, norm, grad_loss, grad, l_b, l_c, l_y, g_b, g_y, g_x, h, w, H, W, scale_y, scale_x,
    stretch_y, stretch_x, steps_y, steps_x, ignore,
    C: tl.constexpr, ALIGN: tl.constexpr, BC: tl.constexpr, BX: tl.constexpr,
):  # fmt: skip
    """grad [B, C, h, w]; steps are the pixels of an axis of the labels, at most, that need a source."""
    blocks = tl.cdiv(w, BX)
    row = tl.program_id(1)  # of all images
    image, i = row // h, row % h
    j = tl.program_id(0) % blocks * BX + tl.arange(0, BX)
    c = (tl.program_id(0) // blocks * BC + tl.arange(0, BC))[:, None]
    mask = (c < C) & (j < w)[None, :]
    column = tl.minimum(j, w - 1)
    before, after = tl.maximum(column - 1, 0)[None, :], tl.minimum(column + 1, w - 1)[None, :]
    column = column[None, :]
    plane = logits + image.to(tl.int64) * l_b + tl.minimum(c, C - 1).to(tl.int64) * l_c
    upper, here, lower = tl.maximum(i - 1, 0) * l_y, i * l_y, tl.minimum(i + 1, h - 1) * l_y
    a0 = tl.load(plane + upper + before).to(tl.float32)
    a1 = tl.load(plane + upper + column).to(tl.float32)
    a2 = tl.load(plane + upper + after).to(tl.float32)
    b0 = tl.load(plane + here + before).to(tl.float32)
    b1 = tl.load(plane + here + column).to(tl.float32)
    b2 = tl.load(plane + here + after).to(tl.float32)
    d0 = tl.load(plane + lower + before).to(tl.float32)
    d1 = tl.load(plane + lower + column).to(tl.float32)
    d2 = tl.load(plane + lower + after).to(tl.float32)

    grad_loss += image.to(tl.int64) * g_b
    first_y, first_x = _first_pixel(i, stretch_y, ALIGN), _first_pixel(j, stretch_x, ALIGN)
    sums = tl.zeros([BC, BX], tl.float32)
    for step_y in range(steps_y):
        y = first_y + step_y
        top, below = _source(y, h, scale_y, ALIGN)
        up, at, down = _shares(top, below, i)
        z0 = up * a0 + at * b0 + down * d0
        z1 = up * a1 + at * b1 + down * d1
        z2 = up * a2 + at * b2 + down * d2
        line = (image.to(tl.int64) * H + y) * W
        width = tl.where(y < H, W, 0)
        for step_x in range(steps_x):
            x = first_x + step_x
            left, right = _source(x, w, scale_x, ALIGN)
            s0, s1, s2 = _shares(left, right, j)
            needed = (x < width) & (s1 > 0)
            label = tl.load(labels + line + x, mask=needed, other=ignore).to(tl.int32)
            weight = tl.load(grad_loss + y * g_y + x * g_x, mask=needed, other=0.0).to(tl.float32)
            weight = tl.where(label == ignore, 0.0, weight * at * s1)
            # Infinity where nothing is needed: a probability of 0.
            level = tl.load(norm + line + x, mask=needed, other=float("inf"))
            z = s0[None, :] * z0 + s1[None, :] * z1 + s2[None, :] * z2
            probability = tl.exp(z - level[None, :])
            sums += weight[None, :] * (probability - tl.where(c == label[None, :], 1.0, 0.0))
    place = ((image.to(tl.int64) * C + c) * h + i) * w + j[None, :]
    tl.store(grad + place, sums.to(grad.dtype.element_ty), mask=mask)
