"""The token mixer of ViG: bidirectional gated linear attention with 2-D gating locality injection.

Paper: "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention", arXiv 2405.18425.
Parameter names are those of the official implementation, so that its checkpoints load.
"""

from torch import Tensor, nn
from vig_kernels import bidirectional_gla, locality_injection

from .layers import DepthwiseConv3x3, RMSNorm

GATE_RANK = 16
GATE_TEMPERATURE = 16


class GLAMixer(nn.Module):
    """Mix the tokens of a map, [B, H, W, C] -> [B, H, W, C], in O(H * W).

    Args:
        dim: channels C, a multiple of 2 * num_heads.
        num_heads: heads h; K = C / 2h channels per key, V = C / h per value.
        activation: SiLU after the depthwise convolution and before the output projection (ViG-T only).
        gla_impl: implementation of the scan, see :func:`vig_kernels.bidirectional_gla`; with one in PyTorch, what
            follows the scan (:func:`vig_kernels.locality_injection`) is in PyTorch, too.
    """

    def __init__(self, dim: int, num_heads: int, activation: bool = False, gla_impl: str = "auto") -> None:
        super().__init__()
        if dim % (2 * num_heads):
            raise ValueError(f"dim={dim} must be a multiple of 2 * num_heads = {2 * num_heads}")
        self.num_heads = num_heads
        self.gla_impl = gla_impl
        self.activation = activation
        self.in_proj = nn.Sequential(DepthwiseConv3x3(dim), nn.SiLU() if activation else nn.Identity())
        self.qkv_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.gk_proj = nn.Sequential(nn.Linear(dim, GATE_RANK, bias=False), nn.Linear(GATE_RANK, dim))
        self.g_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.g_norm = RMSNorm(dim // num_heads)
        self.l_norm = RMSNorm(dim // num_heads)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        h = self.num_heads
        u = self.in_proj(x).flatten(1, 2)  # [B, L, C]
        q, k, v = self.qkv_proj(u).split((C // 2, C // 2, C), dim=-1)
        gate_fwd, gate_bwd = self.gk_proj(u).unflatten(-1, (2, h, -1)).unbind(2)  # logits
        o = bidirectional_gla(
            q.unflatten(-1, (h, -1)),  # [B, L, h, K]
            k.unflatten(-1, (h, -1)),
            v.unflatten(-1, (h, -1)),  # [B, L, h, V]
            gate_fwd,
            gate_bwd,
            impl=self.gla_impl,
            gate_temperature=GATE_TEMPERATURE,
        )
        y = locality_injection(
            o,
            u.unflatten(-1, (h, -1)),
            self.g_proj(u).unflatten(-1, (h, -1)),
            self.g_norm.weight,
            self.l_norm.weight,
            self.g_norm.eps,
            self.activation,
            impl=self.gla_impl if self.gla_impl in ("auto", "triton") else "naive",
        )
        return self.o_proj(y.flatten(-2)).view(B, H, W, C)
