"""Triton kernels of bidirectional gated linear attention; README.md of the folder above derives them.

The states that enter each chunk: `chunk_states`, `scan_totals`, `add_carries`. Forward: these, then `outputs`.
Backward: these on the queries and the gradient of the output, then `outputs` for the gradient of v, and `gradients`.
`outputs` and `gradients` take every chunk for a mild one, whose gates are weak enough for one reference point; what
they write for the others, which `chunk_states` marks as steep, may be anything and is replaced by `steep_outputs` and
`steep_gradients`, which halve those chunks recursively.

`log_gates`, in front of all this, makes log-gates from their low-rank code.

A program walks over chunks of C tokens, of one head each, and loads the next one while it computes. States are [K, V],
of direction 0 (forward scan) and 1 (backward scan).
"""

from .gates import log_gates, log_gates_backward
from .mild import gradients, outputs
from .states import add_carries, chunk_states, scan_totals
from .steep import steep_gradients, steep_outputs

__all__ = [
    "add_carries",
    "chunk_states",
    "gradients",
    "log_gates",
    "log_gates_backward",
    "outputs",
    "scan_totals",
    "steep_gradients",
    "steep_outputs",
]
