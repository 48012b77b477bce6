"""Effective receptive field: which pixels of the image an output token depends on, and how much.

Paper: Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", NIPS 2016,
arXiv 1701.04128.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .modes import evaluation_mode


@dataclass(frozen=True)
class ReceptiveField:
    """Mean over images of ``|d (sum of the channels of a token) / d pixel|``, summed over the colours.

    Attributes:
        map: [H, W], float64 on the CPU; its sum says how large gradients are, its shape where they come from.
        stride: of the output, in pixels.
        position: row and column of the token.
    """

    map: Tensor
    stride: tuple[float, float]
    position: tuple[int, int]

    @property
    def center(self) -> tuple[float, float]:
        """Row and column in pixels: half of the total lies above, and half on the left.

        Not the middle of the token's cell, which tells where a token looks only where padding is the same on all
        sides of a map: those of a ResNet look at the upper left corners of their cells.
        """
        return _median(self.map.sum(1)), _median(self.map.sum(0))

    def side(self, share: float) -> float:
        """Side in pixels of the smallest square around `center` with this share (0 to 1) of the total.

        It may reach over the border of the image, whose other side then counts alone.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share={share}: expected a number above 0, up to 1")
        sides, shares = self.curve()
        # Rounding may leave the last of the sums a little below 1.
        return sides[int((shares >= min(share, shares[-1])).nonzero()[0])].item()

    def area(self, share: float) -> float:
        """The part (0 to 1) of the image that the square of `side` covers."""
        return (self._sides() <= self.side(share)).double().mean().item()

    def curve(self) -> tuple[Tensor, Tensor]:
        """Sides of growing squares around `center`, in pixels, and the share of the total in each, up to 1."""
        sides, order = self._sides().flatten().sort()
        shares = self.map.flatten()[order].cumsum(0) / self.map.sum()
        is_last = torch.cat((sides[1:] > sides[:-1], torch.ones(1, dtype=torch.bool)))  # of the pixels of a square
        return sides[is_last], shares[is_last]

    def _sides(self) -> Tensor:
        """Of the smallest square around the centre that has the whole pixel, [H, W]."""
        rows, columns = (torch.arange(n, dtype=torch.float64) + 0.5 for n in self.map.shape)
        y, x = self.center
        return 2 * torch.maximum((rows - y).abs()[:, None], (columns - x).abs()) + 1


def effective_receptive_field(
    backbone: nn.Module,
    images: Tensor | Iterable[Tensor],
    output: int = -1,
    position: tuple[int, int] | None = None,
    channels_last: bool | None = None,
) -> ReceptiveField:
    """The effective receptive field of a token of any backbone that returns maps, in evaluation mode.

    Images go through the backbone one at a time; no gradient of a parameter is computed, and none is left behind.

    Args:
        backbone: ViG, HierViG, or another one: images [1, 3, H, W] -> a map, or a list, tuple or dict of maps.
        images: normalised, [B, 3, H, W], or as an iterable of [3, H, W]; all of one size, and the more the better.
        output: which of the maps.
        position: row and column of the token in it; by default that in the middle.
        channels_last: maps are [1, H, W, C]; by default what `backbone.output_fmt` says, which timm's models have,
            else [1, C, H, W].

    Raises:
        ValueError: no images, images of several sizes, no such output or token, or nothing that depends on the image.
    """
    if channels_last is None:
        channels_last = str(getattr(backbone, "output_fmt", "NCHW")).endswith("NHWC")
    total, count, stride = None, 0, None
    with torch.enable_grad(), evaluation_mode(backbone):
        for image in images:
            image = image.detach()[None].clone().requires_grad_()
            feature = _select(backbone(image), output, channels_last)
            row, column = _check_position(feature, position)
            stride = tuple(stride_of(pixels, tokens) for pixels, tokens in zip(image.shape[2:], feature.shape[1:]))
            (gradient,) = torch.autograd.grad(feature[:, row, column].sum(), image)
            gradient = gradient[0].abs().sum(0).double().cpu()
            if total is not None and gradient.shape != total.shape:
                raise ValueError(f"images of {_size(total)} and {_size(gradient)} pixels: expected one size")
            total = gradient if total is None else total + gradient
            count += 1
    if total is None:
        raise ValueError("no images: expected a tensor [B, 3, H, W], or an iterable of [3, H, W]")
    if not 0 < total.sum() < torch.inf:
        raise ValueError(f"the sum of the gradients is {total.sum().item()}: expected a positive, finite number")
    return ReceptiveField(total / count, stride, (row, column))


def _select(outputs: Any, index: int, channels_last: bool) -> Tensor:
    """One of the maps of a backbone for one image, [C, H, W]."""
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    maps = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if not -len(maps) <= index < len(maps):
        raise ValueError(f"output={index}: the backbone returns {len(maps)} maps, counted from 0")
    chosen = maps[index]
    if not isinstance(chosen, Tensor) or chosen.dim() != 4:
        shape = list(chosen.shape) if isinstance(chosen, Tensor) else type(chosen).__name__
        raise ValueError(
            f"the backbone returned {shape}, expected a map [1, C, H, W]; timm's models return maps if they are made "
            "with features_only=True"
        )
    return (chosen.permute(0, 3, 1, 2) if channels_last else chosen)[0]


def _check_position(feature: Tensor, position: tuple[int, int] | None) -> tuple[int, int]:
    """Row and column of a token of a map [C, H, W], by default of the one in the middle."""
    H, W = feature.shape[1:]
    row, column = (H // 2, W // 2) if position is None else position
    if not (0 <= row < H and 0 <= column < W):
        raise ValueError(f"position={position}: the map has {H} x {W} tokens, counted from 0")
    return row, column


def _median(weights: Tensor) -> float:
    """Where half of the weights of pixels lies before, each spread over its pixel."""
    sums = weights.cumsum(0)
    pixel = int(torch.searchsorted(sums, sums[-1] / 2))
    return (pixel + 1 - (sums[pixel] - sums[-1] / 2) / weights[pixel]).item()


def stride_of(pixels: int, tokens: int) -> float:
    """Of a map that covers the image, and perhaps padding behind it: a power of two where there is one that fits."""
    stride = 2 ** max(0, (pixels - 1) // tokens).bit_length()
    return float(stride) if -(-pixels // stride) == tokens else pixels / tokens


def _size(x: Tensor) -> str:
    return f"{x.shape[0]} x {x.shape[1]}"
