"""The token mixer of ViG: bidirectional gated linear attention with 2-D gating locality injection.

Paper: "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention", arXiv 2405.18425.
Parameter names are those of the official implementation, so that its checkpoints load.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vig_kernels import bidirectional_gla, locality_injection, log_gates

from .layers import DepthwiseConv3x3, RMSNorm

GATE_RANK = 16
GATE_TEMPERATURE = 16


def impl_around_the_scan(gla_impl: str) -> str:
    """Of the other operators: they know no more than PyTorch (`naive`) and Triton."""
    return gla_impl if gla_impl in ("auto", "triton") else "naive"


class GLAMixer(nn.Module):
    """Mix the tokens of a map, [B, H, W, C] -> [B, H, W, C], in O(H * W).

    Args:
        dim: channels C, a multiple of 2 * num_heads.
        num_heads: heads h; K = C / 2h channels per key, V = C / h per value.
        activation: SiLU after the depthwise convolution and before the output projection (ViG-T only).
        gla_impl: implementation of the scan, see :func:`vig_kernels.bidirectional_gla`; with one in PyTorch, what
            surrounds the scan (convolution, :func:`vig_kernels.log_gates`, :func:`vig_kernels.locality_injection`)
            is, too.
    """

    def __init__(self, dim: int, num_heads: int, activation: bool = False, gla_impl: str = "auto") -> None:
        super().__init__()
        if dim % (2 * num_heads):
            raise ValueError(f"dim={dim} must be a multiple of 2 * num_heads = {2 * num_heads}")
        self.num_heads = num_heads
        self.gla_impl = gla_impl
        self.activation = activation
        self.in_proj = nn.Sequential(DepthwiseConv3x3(dim, activation, impl_around_the_scan(gla_impl)))
        self.qkv_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.gk_proj = nn.Sequential(nn.Linear(dim, GATE_RANK, bias=False), nn.Linear(GATE_RANK, dim))
        self.g_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.g_norm = RMSNorm(dim // num_heads)
        self.l_norm = RMSNorm(dim // num_heads)

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        """With valid `sizes`, [B, 2], no token depends on the padding, whose own result is finite and means nothing."""
        B, H, W, C = x.shape
        h, impl = self.num_heads, impl_around_the_scan(self.gla_impl)
        u = self.in_proj[0](x, sizes).flatten(1, 2)  # [B, L, C]
        (q, k, v, code, logits), gate_bias = self._project(u)
        to_gates = self.gk_proj[1]
        if type(to_gates) is not nn.Linear:
            raise TypeError(
                f"gk_proj[1] is a {type(to_gates).__name__}, but the gates are made from its weight and bias without "
                "calling it: leave it an nn.Linear (exclude gk_proj.1 from adapters and from quantisation)"
            )
        log_gate_fwd, log_gate_bwd = log_gates(code, to_gates.weight, to_gates.bias, h, GATE_TEMPERATURE, impl=impl)
        o = bidirectional_gla(
            q.unflatten(-1, (h, -1)),  # [B, L, h, K]
            k.unflatten(-1, (h, -1)),
            v.unflatten(-1, (h, -1)),  # [B, L, h, V]
            log_gate_fwd,
            log_gate_bwd,
            impl=self.gla_impl,
            valid_sizes=sizes,
            width=None if sizes is None else W,
        )
        y = locality_injection(
            o,
            u.unflatten(-1, (h, -1)),
            logits.unflatten(-1, (h, -1)),
            self.g_norm.weight,
            self.l_norm.weight,
            self.g_norm.eps,
            self.activation,
            impl=impl,
            gate_bias=gate_bias,
        )
        return self.o_proj(y.flatten(-2)).view(B, H, W, C)

    def _project(self, u: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Queries, keys, values, the code of the gates and the logits of the injection, from one product.

        And the bias that the logits lack: in the product it would cost as much as half of that.
        """
        C = u.shape[-1]
        projections = self.qkv_proj, self.gk_proj[0], self.g_proj
        if all(type(x) is nn.Linear for x in projections):
            out = F.linear(u, torch.cat([x.weight for x in projections]))
            bias = self.g_proj.bias.view(self.num_heads, -1)
        else:  # somebody has put adapters around them, or quantised them
            out, bias = torch.cat([x(u) for x in projections], dim=-1), None
        return out.split((C // 2, C // 2, C, GATE_RANK, C), dim=-1), bias
