"""The spatial prior module: a small convolutional pyramid of the image itself."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from ...padding import at_stride, clear_padding


class ConvNorm(nn.Sequential):
    """3x3 convolution, norm and ReLU on a map [B, C, H, W]; zeros in the place of padding."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm_cfg: dict) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
            build_norm_layer(norm_cfg, out_channels)[1],
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor, sizes: Tensor | None) -> Tensor:
        return super().forward(clear_padding(x, sizes))


class SpatialPrior(nn.Module):
    """Images [B, 3, H, W] -> {s: map [B, dim, ceil(H/s), ceil(W/s)]} for `strides` s; what it has in padding is no use.

    Args:
        dim: channels of the outputs.
        strides: which of 4, 8, 16 and 32 are given out.
        channels: of the stem; twice and four times as many follow.
        norm_cfg: of the norm behind each 3x3 convolution.
    """

    def __init__(self, dim: int, strides: Sequence[int], channels: int, norm_cfg: dict) -> None:
        super().__init__()
        self.stem = nn.ModuleList(
            ConvNorm(inputs, channels, stride, norm_cfg) for inputs, stride in ((3, 2), (channels, 1), (channels, 1))
        )
        widths = {4: channels, 8: 2 * channels, 16: 4 * channels, 32: 4 * channels}
        self.convs = nn.ModuleDict({str(s): ConvNorm(widths[s // 2], widths[s], 2, norm_cfg) for s in (8, 16, 32)})
        self.projections = nn.ModuleDict({str(s): nn.Conv2d(widths[s], dim, 1) for s in strides})

    def forward(self, x: Tensor, valid_sizes: Tensor | None) -> dict[int, Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        for conv, stride in zip(self.stem, (1, 2, 2)):
            x = conv(x, at_stride(valid_sizes, stride))
        # Zeros in the padding are as good as nothing: behind a ReLU no maximum is less.
        x = F.max_pool2d(clear_padding(x, at_stride(valid_sizes, 2)), 3, stride=2, padding=1)
        maps = {4: x}
        for stride, conv in self.convs.items():
            x = conv(x, at_stride(valid_sizes, int(stride) // 2))
            maps[int(stride)] = x
        return {int(stride): project(maps[int(stride)]) for stride, project in self.projections.items()}
