"""Triton kernel of the label map."""

import triton
import triton.language as tl

from ..online_softmax import LOWEST, merge_slots


@triton.jit(do_not_specialize=["l_c", "l_y", "N", "M", "TAPS_Y", "TAPS_X"])
def classify(
    logits, row_index, row_weight, column_index, column_weight, classes, scores, l_b, l_c, l_y, N, M, TAPS_Y, TAPS_X,
    C: tl.constexpr, BC: tl.constexpr, BX: tl.constexpr,
):  # fmt: skip
    """classes and, where wanted, scores [B, N, M], from logits [B, C, h, w] and the maps' index and weight [T, N]."""
    blocks = tl.cdiv(M, BX)
    row = tl.program_id(0) // blocks  # of all images
    y = row % N
    x = tl.program_id(0) % blocks * BX + tl.arange(0, BX)
    exists = x < M
    logits += (row // N).to(tl.int64) * l_b
    # Of every slot of the tile: each BC-th class.
    largest = tl.full([BC, BX], LOWEST, tl.float32)
    total = tl.zeros([BC, BX], tl.float32)
    winner = tl.zeros([BC, BX], tl.int32)
    for first in range(0, C, BC):
        c = (first + tl.arange(0, BC))[:, None]
        plane = logits + c.to(tl.int64) * l_c
        z = tl.zeros([BC, BX], tl.float32)
        for tap_x in range(TAPS_X):
            column = tl.load(column_index + tap_x * M + x, mask=exists, other=0)[None, :]
            part = tl.zeros([BC, BX], tl.float32)
            for tap_y in range(TAPS_Y):
                above = tl.load(row_index + tap_y * N + y) * l_y
                numbers = tl.load(plane + above + column, mask=c < C, other=0.0).to(tl.float32)
                part += numbers * tl.load(row_weight + tap_y * N + y)
            z += part * tl.load(column_weight + tap_x * M + x, mask=exists, other=0.0)[None, :]
        z = tl.where(c < C, z, float("-inf"))
        winner = tl.where(z > largest, c, winner)
        before, largest = largest, tl.maximum(largest, z)
        if scores is not None:
            total = total * tl.exp(before - largest) + tl.exp(z - largest)
    _, total, best = merge_slots(largest, total, winner, C)
    pixels = row.to(tl.int64) * M + x
    tl.store(classes + pixels, best.to(tl.int64), mask=exists)
    if scores is not None:
        tl.store(scores + pixels, 1 / total, mask=exists)
