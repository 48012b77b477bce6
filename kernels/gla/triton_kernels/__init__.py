"""Triton kernels of bidirectional gated linear attention; README.md of the folder above derives them.

Forward: `chunk_states` (what each chunk adds to the states of both directions), `scan_states` (the states that enter
each chunk), `outputs`. Backward: `chunk_states` and `scan_states` on the queries and the gradient of the output, then
`gradients`. `outputs` and `gradients` take every chunk for a mild one, whose gates are weak enough for one reference
point; what they write for the others, which `chunk_states` marks as steep, may be anything and is replaced by
`steep_outputs` and `steep_gradients`, which halve those chunks recursively.

One program works on one chunk of C tokens of one head; programs of neighbouring heads are neighbours, because their
numbers are neighbours in memory. States are [V, K], of direction 0 (forward scan) and 1 (backward scan).
"""

from .common import INTERPRETED
from .mild import gradients, outputs
from .states import chunk_states, scan_states
from .steep import steep_gradients, steep_outputs

__all__ = [
    "INTERPRETED",
    "chunk_states",
    "gradients",
    "outputs",
    "scan_states",
    "steep_gradients",
    "steep_outputs",
]
