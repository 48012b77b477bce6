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


class PatchConv(nn.Conv2d):
    """An image [B, C, H, W] -> [B, D, ceil(H/s), ceil(W/s)] with stride s, kernel s + 1 and padding 1, first of a stem.

    Zeros on the right and below, up to a multiple of s, keep every pixel. For three channels GPUs have no fast kernel:
    there it is a 2x2 convolution of blocks of s x s pixels, which are its channels. The sums are the same, but for
    their order, and zeros in them.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, stride + 1, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        s = self.stride[0]
        H, W = x.shape[-2:]
        x = F.pad(x, (0, (W + s - 1) // s * s - W, 0, (H + s - 1) // s * s - H))
        if not x.is_cuda:
            return super().forward(x.contiguous(memory_format=torch.channels_last))
        if torch.is_autocast_enabled("cuda"):
            x = x.to(torch.get_autocast_dtype("cuda"))
        return conv_by_blocks(x, self.weight, self.bias, s)


def conv_by_blocks(x: Tensor, weight: Tensor, bias: Tensor | None, s: int) -> Tensor:
    """``F.conv2d(x, weight, bias, stride=s, padding=1)`` for kernels of s + 1 and sides that are multiples of s."""
    more = -x.shape[1] % (1 if s % 4 == 0 else 4)  # channels of blocks are multiples of 8: tensor cores ask for it
    x, weight = F.pad(x, (s, 0, s, 0, 0, more)), F.pad(weight, (s - 1, 0, s - 1, 0, 0, more))
    B, C, H, W = x.shape
    blocks = x.view(B, C, H // s, s, W // s, s).permute(0, 2, 4, 1, 3, 5).flatten(3)  # [B, H / s, W / s, C s^2]
    return F.conv2d(blocks.permute(0, 3, 1, 2), F.pixel_unshuffle(weight, s), bias)


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
