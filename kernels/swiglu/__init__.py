"""A linear layer and its SwiGLU, the first half of a gated feed-forward part, in one operator."""

from .dispatch import IMPLEMENTATIONS, linear_swiglu
from .naive import naive_linear_swiglu

__all__ = ["IMPLEMENTATIONS", "linear_swiglu", "naive_linear_swiglu"]
