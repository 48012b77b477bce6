"""Residual sum and normalisation in one operator: RMSNorm and LayerNorm over channels."""

from .dispatch import IMPLEMENTATIONS, add_norm
from .naive import naive_add_norm

__all__ = ["IMPLEMENTATIONS", "add_norm", "naive_add_norm"]
