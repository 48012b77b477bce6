"""The class of every pixel from logits of a lower resolution, without logits of full resolution."""

from .dispatch import IMPLEMENTATIONS, resized_argmax
from .naive import naive_resized_argmax

__all__ = ["IMPLEMENTATIONS", "naive_resized_argmax", "resized_argmax"]
