"""Operators of gated linear attention. Knows nothing of models; needs torch alone."""

from .gla import bidirectional_gla
from .injection import locality_injection

__all__ = ["bidirectional_gla", "locality_injection"]
