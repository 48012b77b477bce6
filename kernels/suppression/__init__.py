"""Non-maximum suppression of many groups of boxes at once, for which nobody waits."""

from .dispatch import IMPLEMENTATIONS, grouped_nms
from .naive import naive_grouped_nms

__all__ = ["IMPLEMENTATIONS", "grouped_nms", "naive_grouped_nms"]
