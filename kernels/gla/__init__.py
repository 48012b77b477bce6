"""Bidirectional gated linear attention: definition, PyTorch form and the dispatch between them."""

from .chunk import chunk_bidirectional_gla
from .dispatch import IMPLEMENTATIONS, bidirectional_gla
from .gates import log_gates
from .naive import naive_bidirectional_gla

__all__ = ["IMPLEMENTATIONS", "bidirectional_gla", "chunk_bidirectional_gla", "log_gates", "naive_bidirectional_gla"]
