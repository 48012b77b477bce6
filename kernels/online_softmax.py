"""What the Triton kernels over classes share: maximum, sum of exponentials and winner, kept for every slot of a tile.

A tile [BC, BX] takes BC classes of BX pixels at a time; nothing is reduced across slots before the end.
"""

import triton
import triton.language as tl

from .launch import power_of_2_from

# Below all logits, but finite: the difference of two of them is 0.
LOWEST = tl.constexpr(-3.4028234e38)


@triton.jit
def merge_slots(largest, total, winner, C: tl.constexpr):
    """[BC, BX] each; returns maximum, sum of the exponentials relative to it, and the first class that has it, [BX]."""
    most = tl.max(largest, 0)
    total = tl.sum(total * tl.exp(largest - most[None, :]), 0)
    return most, total, tl.min(tl.where(largest == most[None, :], winner, C), 0)


def class_tile(C: int, width: int, largest: tuple[int, int, int]) -> dict[str, int]:
    """Constants of a kernel for C classes and lines of so many pixels.

    Args:
        largest: classes and pixels of a program's tile, and its warps. Where there are fewer classes, it takes more
            pixels instead.
    """
    classes, pixels, warps = largest
    BC = min(classes, power_of_2_from(C))
    BX = min(pixels * classes // BC, max(16, power_of_2_from(width)))
    return dict(C=C, BC=BC, BX=BX, num_warps=warps)
