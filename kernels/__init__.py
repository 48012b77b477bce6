"""Operators of gated linear attention. Knows nothing of models; needs torch alone."""

from .depthwise import depthwise_conv3x3
from .gla import bidirectional_gla, log_gates
from .injection import locality_injection
from .norm import add_norm
from .resampling import Resampling
from .resized_argmax import resized_argmax
from .resized_loss import resized_cross_entropy
from .suppression import grouped_nms
from .swiglu import linear_swiglu

__all__ = [
    "Resampling",
    "add_norm",
    "bidirectional_gla",
    "depthwise_conv3x3",
    "grouped_nms",
    "linear_swiglu",
    "locality_injection",
    "log_gates",
    "resized_argmax",
    "resized_cross_entropy",
]
