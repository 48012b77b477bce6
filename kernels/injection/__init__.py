"""Gating locality injection: the per-head norms of scan and local branch and their gated mix, in one operator."""

from .dispatch import IMPLEMENTATIONS, locality_injection
from .naive import naive_locality_injection

__all__ = ["IMPLEMENTATIONS", "locality_injection", "naive_locality_injection"]
