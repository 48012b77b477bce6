"""Small layers that both backbones share. Tokens are channels-last, [B, H, W, C], unless a name says 2d."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vig_kernels import depthwise_conv3x3


def at_least_float32(x: Tensor) -> Tensor:
    """x itself in float32 or float64, otherwise a float32 copy."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in float32; returns the type of x."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = at_least_float32(x)
        return F.rms_norm(x32, self.weight.shape, self.weight.to(x32.dtype), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map [B, C, H, W]; keeps a channels-last memory layout as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DepthwiseConv3x3(nn.Conv2d):
    """3x3 depthwise convolution with zero padding and no bias on tokens [B, H, W, C], read where they lie.

    Args:
        activation: SiLU at the end.
        impl: see :func:`vig_kernels.depthwise_conv3x3`.
    """

    def __init__(self, dim: int, activation: bool = False, impl: str = "auto") -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.activation = activation
        self.impl = impl

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv3x3(x, self.weight, self.activation, self.impl)


class DropPath(nn.Module):
    """Drop the whole branch of a sample with probability `rate` while training (stochastic depth)."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop path rate must lie in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return x
        keep = x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * keep.div_(1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def swiglu(gate_and_value: Tensor) -> Tensor:
    """[.., 2D] -> SiLU(first half) * second half, [.., D]."""
    gate, value = gate_and_value.chunk(2, dim=-1)
    return F.silu(gate) * value


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Rates that grow linearly from 0 at the first block to `rate` at the last."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
