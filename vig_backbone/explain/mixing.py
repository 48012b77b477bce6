"""The output of a token mixer as a sum of three parts: forward scan, backward scan, local branch.

From the same submodules as :class:`GLAMixer`, but one direction of the scan at a time. Letters as there: B batch,
H x W tokens, L = H * W, C channels, h heads, K and V key and value size per head.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from vig_kernels import bidirectional_gla

from ..mixer import GATE_TEMPERATURE, GLAMixer
from ..padding import valid_mask

# A log-gate through which nothing passes: its exponential is 0 in every type. Not -inf, as the scan takes finite ones.
CLOSED = -1e4


class MixerParts(NamedTuple):
    """Gates of a mixer, and the parts of what it gives its output projection.

    log_gate_forward, log_gate_backward: of the two scans, [B, L, h, K].
    gate: G of the locality injection, the share that the scan has before the parts are weighed, [B, L, h, V].
    forward, backward, local: [B, L, h, V]; ``o_proj(forward + backward + local)`` is the output of the mixer.
    """

    log_gate_forward: Tensor
    log_gate_backward: Tensor
    gate: Tensor
    forward: Tensor
    backward: Tensor
    local: Tensor


def split_mixer(mixer: GLAMixer, x: Tensor, sizes: Tensor | None = None) -> MixerParts:
    """What `mixer` does with x [B, H, W, C], its parts apart; they add up to rounding.

    The norm of the scan, ``o / rms(o)``, has the whole scan's rms in both directions' parts. So it is with the SiLU
    at the end of ViG-T: ``silu(y) = sigmoid(y) * y`` counts as one more gate, that of the whole y, on each part of y.

    Args:
        sizes: valid sizes, [B, 2], as for the mixer; parts in the padding mean nothing.
    """
    width, C = x.shape[2:]
    heads = (mixer.num_heads, -1)
    u = mixer.in_proj[0](x, sizes).flatten(1, 2)  # [B, L, C]
    q, k, v = (part.unflatten(-1, heads) for part in mixer.qkv_proj(u).split((C // 2, C // 2, C), dim=-1))
    log_gates = F.logsigmoid(mixer.gk_proj(u)) / GATE_TEMPERATURE
    log_gate_forward, log_gate_backward = log_gates.unflatten(-1, (2, *heads)).unbind(2)  # [B, L, h, K]
    gate = mixer.g_proj(u).sigmoid().unflatten(-1, heads)
    forward, backward = split_scan(q, k, v, log_gate_forward, log_gate_backward, sizes, width)
    scan = forward + backward
    norm = gate * mixer.g_norm.weight * (scan.square().mean(-1, keepdim=True) + mixer.g_norm.eps).rsqrt()
    parts = [norm * forward, norm * backward, (1 - gate) * mixer.l_norm(u.unflatten(-1, heads))]
    if mixer.activation:
        last_gate = sum(parts).sigmoid()
        parts = [last_gate * part for part in parts]
    return MixerParts(log_gate_forward, log_gate_backward, gate, *parts)


def split_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate_forward: Tensor,
    log_gate_backward: Tensor,
    sizes: Tensor | None = None,
    width: int = 1,
) -> tuple[Tensor, Tensor]:
    """The halves of :func:`vig_kernels.bidirectional_gla` that come from the forward and from the backward scan.

    Shapes as there; [B, L, h, V] each. Both have the token itself. A scan whose gates are closed gives that token
    alone, which is what the other direction's call has too much, once.
    """
    own = (q * k).sum(-1, keepdim=True) * (v * q.shape[-1] ** -0.5)
    options = dict(impl="chunk", valid_sizes=sizes, width=None if sizes is None else width)
    closed = q.new_full((), CLOSED).expand_as(q)
    if sizes is not None:
        mask = valid_mask(sizes, q.shape[1] // width, width).flatten(1)
        own = own.masked_fill(~mask[:, :, None, None], 0)
    forward = bidirectional_gla(q, k, v, log_gate_forward, closed, **options) - own / 2
    backward = bidirectional_gla(q, k, v, closed, log_gate_backward, **options) - own / 2
    return forward, backward
