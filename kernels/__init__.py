"""Operators of gated linear attention. Knows nothing of models; needs torch alone."""

from .depthwise import depthwise_conv3x3
from .gla import bidirectional_gla, log_gates
from .injection import locality_injection

__all__ = ["bidirectional_gla", "depthwise_conv3x3", "locality_injection", "log_gates"]
