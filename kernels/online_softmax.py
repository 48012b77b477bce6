"""What the Triton kernels over classes share: maximum, sum of exponentials and winner, kept for every slot of a tile.

A tile [BC, BX] takes BC classes of BX pixels at a time; nothing is reduced across slots before the end.
"""

import triton
import triton.language as tl

# Below all logits, but finite: the difference of two of them is 0.
LOWEST = tl.constexpr(-3.4028234e38)


@triton.jit
def merge_slots(largest, total, winner, C: tl.constexpr):
    """[BC, BX] each; returns maximum, sum of the exponentials relative to it, and the first class that has it, [BX]."""
    most = tl.max(largest, 0)
    total = tl.sum(total * tl.exp(largest - most[None, :]), 0)
    return most, total, tl.min(tl.where(largest == most[None, :], winner, C), 0)
