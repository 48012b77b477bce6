"""Depthwise 3x3 convolution of channels-last tokens, with SiLU where asked for, in one operator."""

from .dispatch import IMPLEMENTATIONS, depthwise_conv3x3
from .naive import naive_depthwise_conv3x3

__all__ = ["IMPLEMENTATIONS", "depthwise_conv3x3", "naive_depthwise_conv3x3"]
