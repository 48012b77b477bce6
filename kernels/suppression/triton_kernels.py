"""Triton kernel of the suppression."""

import triton
import triton.language as tl


@triton.jit
def _coordinates(boxes, i, exists):
    """Left, upper, right, lower of some boxes."""
    boxes += i.to(tl.int64) * 4
    left = tl.load(boxes, mask=exists, other=0.0).to(tl.float32)
    upper = tl.load(boxes + 1, mask=exists, other=0.0).to(tl.float32)
    right = tl.load(boxes + 2, mask=exists, other=0.0).to(tl.float32)
    lower = tl.load(boxes + 3, mask=exists, other=0.0).to(tl.float32)
    return left, upper, right, lower


@triton.jit
def _hits(a_left, a_upper, a_right, a_lower, left, upper, right, lower, threshold):
    """Which pairs [A, I] overlap by more."""
    width = tl.minimum(a_right[:, None], right[None, :]) - tl.maximum(a_left[:, None], left[None, :])
    height = tl.minimum(a_lower[:, None], lower[None, :]) - tl.maximum(a_upper[:, None], upper[None, :])
    common = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    areas = ((a_right - a_left) * (a_lower - a_upper))[:, None] + ((right - left) * (lower - upper))[None, :]
    return common > threshold * (areas - common)  # a division would be a third of all instructions


@triton.jit(do_not_specialize=["M", "GROUPS", "threshold"])
def suppress(boxes, valid, kept, starts, M, GROUPS, threshold, BI: tl.constexpr, BJ: tl.constexpr):
    """kept [B, M] from boxes [B, M, 4], valid [B, M] and the places `starts` [GROUPS + 1] where groups begin."""
    group = tl.program_id(0) % GROUPS
    first = tl.load(starts + group)
    count = tl.load(starts + group + 1) - first
    place = (tl.program_id(0) // GROUPS).to(tl.int64) * M + first
    boxes += place * 4
    valid += place
    kept += place
    own = tl.arange(0, BI)
    for start in range(0, count, BI):
        i = start + own
        exists = i < count
        left, upper, right, lower = _coordinates(boxes, i, exists)
        alive = tl.load(valid + i, mask=exists, other=0) != 0
        # What the blocks before have left removes boxes of this one.
        for before in range(0, start, BJ):
            j = before + tl.arange(0, BJ)
            remains = tl.load(kept + j, mask=j < start, other=0) != 0
            a_left, a_upper, a_right, a_lower = _coordinates(boxes, j, j < start)
            hits = _hits(a_left, a_upper, a_right, a_lower, left, upper, right, lower, threshold)
            alive = alive & (tl.max((hits & remains[:, None]).to(tl.int32), 0) == 0)
        # Within the block: after n rounds the first n boxes are decided, usually all of them after a few.
        hits = _hits(left, upper, right, lower, left, upper, right, lower, threshold) & (own[:, None] < own[None, :])
        remains = alive
        changes = 1
        while changes > 0:
            better = alive & (tl.max((hits & remains[:, None]).to(tl.int32), 0) == 0)
            changes = tl.sum((better != remains).to(tl.int32), 0)
            remains = better
        tl.store(kept + i, remains.to(tl.uint8), mask=exists)
        tl.debug_barrier()  # before other threads of the program read it
