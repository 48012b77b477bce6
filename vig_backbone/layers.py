"""Small layers that both backbones share. Tokens are channels-last, [B, H, W, C], unless a name says 2d."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vig_kernels import add_norm, depthwise_conv3x3, linear_swiglu
from vig_kernels.arguments import is_autocast, type_of_products


class _Norm(nn.Module):
    """Base of the norms over the last dimension, which compute in float32."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    eps: float
    impl: str = "auto"  # see :func:`vig_kernels.add_norm`

    def before_products(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """norm(x + branch), in the type that the products have which take it, and the sum."""
        return add_norm(x, branch, self.weight, self.bias, self.eps, type_of_products(x), self.impl)


class RMSNorm(_Norm):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in float32; returns the type of x."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.register_parameter("bias", None)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return add_norm(x, None, self.weight, None, self.eps, impl=self.impl)[0]

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(_Norm, nn.LayerNorm):
    """As torch's, also in that it returns float32 in an autocast region."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32) if is_autocast(x) else x.dtype
        return add_norm(x, None, self.weight, self.bias, self.eps, dtype, self.impl)[0]


class LayerNorm2d(LayerNorm):
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
        return conv_by_blocks(x.to(type_of_products(x)), self.weight, self.bias, s)


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

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        """With valid `sizes`, [B, 2], padding counts as zeros and gets zeros."""
        return depthwise_conv3x3(x, self.weight, self.activation, self.impl, valid_sizes=sizes)


class DropPath(nn.Module):
    """Drop the whole branch of a sample with probability `rate` while training (stochastic depth)."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    @property
    def rate(self) -> float:
        return self._rate

    @rate.setter
    def rate(self, rate: float) -> None:
        if not 0 <= rate < 1:
            raise ValueError(f"drop path rate must lie in [0, 1), got {rate}")
        self._rate = rate
        # A tensor, so that blocks that differ in it alone share a compiled graph; on the CPU, where reading it is free.
        self._kept = torch.tensor(1 - rate, device="cpu")
        self._drops = rate > 0

    def forward(self, x: Tensor) -> Tensor:
        if not (self._drops and self.training):
            return x
        keep = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) < self._kept
        return x * (keep / self._kept).to(x.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class GatedLinear(nn.Linear):
    """Tokens [.., C] -> SiLU(first half) * second half of a linear layer without bias to 2 D channels, [.., D]."""

    impl: str = "auto"  # see :func:`vig_kernels.linear_swiglu`

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(dim, 2 * hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear_swiglu(x, self.weight, self.impl)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Rates that grow linearly from 0 at the first block to `rate` at the last."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
