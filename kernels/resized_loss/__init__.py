"""Cross-entropy of logits against labels of a higher resolution, without logits of that resolution."""

from .dispatch import IMPLEMENTATIONS, resized_cross_entropy
from .naive import naive_resized_cross_entropy

__all__ = ["IMPLEMENTATIONS", "naive_resized_cross_entropy", "resized_cross_entropy"]
