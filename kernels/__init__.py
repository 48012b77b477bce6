"""Operators of gated linear attention. Knows nothing of models; needs torch alone."""

from .gla import bidirectional_gla

__all__ = ["bidirectional_gla"]
