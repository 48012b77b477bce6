"""The simple feature pyramid of ViTDet (arXiv 2203.16527, section 3): all scales from the last map of a plain backbone.

Strides 4, 8, 16 and 32 come from two, one and no transposed convolutions and one max-pooling; further ones by
subsampling the coarsest, as in an FPN.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import LayerNorm2d

SCALES = (4.0, 2.0, 1.0, 0.5)


class SimpleFeaturePyramid(nn.Module):
    """Maps of a plain backbone -> `num_outs` maps ``[B, out_channels, s * H, s * W]``, s = 4, 2, 1, 1/2, 1/4, ...

    Args:
        in_channels: channels of the last input map ``[B, in_channels, H, W]``; the others are ignored.
        out_channels: channels of every output.
        num_outs: number of outputs, at least 4.
    """

    def __init__(self, in_channels: int, out_channels: int = 256, num_outs: int = 5) -> None:
        super().__init__()
        if num_outs < len(SCALES):
            raise ValueError(f"num_outs={num_outs}: the pyramid has at least {len(SCALES)} levels")
        self.num_outs = num_outs
        self.levels = nn.ModuleList(self._level(scale, in_channels, out_channels) for scale in SCALES)

    @staticmethod
    def _level(scale: float, in_channels: int, out_channels: int) -> nn.Sequential:
        if scale == 4:
            dim = in_channels // 4
            resize = [
                nn.ConvTranspose2d(in_channels, in_channels // 2, 2, stride=2),
                LayerNorm2d(in_channels // 2),
                nn.GELU(),
                nn.ConvTranspose2d(in_channels // 2, dim, 2, stride=2),
            ]
        elif scale == 2:
            dim = in_channels // 2
            resize = [nn.ConvTranspose2d(in_channels, dim, 2, stride=2)]
        else:
            dim = in_channels
            resize = [nn.Identity() if scale == 1 else nn.MaxPool2d(2, ceil_mode=True)]
        return nn.Sequential(
            *resize,
            nn.Conv2d(dim, out_channels, 1, bias=False),
            LayerNorm2d(out_channels),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            LayerNorm2d(out_channels),
        )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps of the backbone, the last one [B, in_channels, H, W] -> the pyramid, finest level first."""
        outputs = [level(inputs[-1]) for level in self.levels]
        while len(outputs) < self.num_outs:
            outputs.append(F.max_pool2d(outputs[-1], 1, stride=2))
        return tuple(outputs)
