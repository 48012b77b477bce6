"""Token grids of several strides over one image, and where the attention between them looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...padding import at_stride, clear_padding, valid_mask


class Grid(NamedTuple):
    """A map of H x W tokens at a stride; of image b, ``sizes[b]`` rows and columns, all of them where that is None."""

    stride: int
    H: int
    W: int
    sizes: Tensor | None

    @staticmethod
    def of(x: Tensor, stride: int, valid_sizes: Tensor | None) -> Grid:
        """That of a map [B, C, H, W], given the valid sizes of the images in pixels."""
        return Grid(stride, *x.shape[-2:], at_stride(valid_sizes, stride))

    def centres(self, stride: int, device: torch.device) -> Tensor:
        """Where the centres of the tokens lie on a map of another stride, x and y in its pixels: [H W, 2]."""
        y, x = ((torch.arange(n, device=device) + 0.5) * (self.stride / stride) for n in (self.H, self.W))
        return torch.stack((x.expand(self.H, -1), y[:, None].expand(-1, self.W)), -1).flatten(0, 1)


class Route(NamedTuple):
    """From which pixels Q queries read K values, the tokens of L grids one after the other.

    The places depend on strides alone, so that the size of the batch moves nothing: an image that is no multiple of
    32 pixels is cut off, not stretched.
    """

    points: Tensor  # [Q, L, 2], in pixels of each grid, the first one's centre at 0.5
    levels: tuple[Grid, ...]
    padding: Tensor | None  # [B, K]: values that are none


def route(queries: Sequence[Grid], levels: Sequence[Grid], device: torch.device) -> Route:
    """Every token of `queries` reads around its own place on each of `levels`. Nothing waits for the device."""
    points = [torch.cat([grid.centres(level.stride, device) for grid in queries]) for level in levels]
    padding = None
    if levels[0].sizes is not None:
        padding = torch.cat([~valid_mask(grid.sizes, grid.H, grid.W).flatten(1) for grid in levels], 1)
    return Route(torch.stack(points, 1), tuple(levels), padding)


def resize(x: Tensor, source: Grid, target: Grid) -> Tensor:
    """A map [B, C, H, W] on another grid over the same images, bilinear; finite in the padding.

    Like ``F.interpolate(.., align_corners=False)`` by the exact ratio of the strides, whatever the sizes; what lies
    outside of an image counts as the nearest pixel inside, be it beyond the tensor or padding.
    """
    if source.sizes is None:
        return _resample(x, source, target)
    inside = valid_mask(source.sizes, source.H, source.W)[:, None].to(x.dtype)
    share = _resample(inside, source, target)  # of the weights that fall on the image
    # No pixel of an image has less than half the weight in each direction.
    return _resample(clear_padding(x, source.sizes), source, target) / share.clamp(min=0.25)


def _resample(x: Tensor, source: Grid, target: Grid) -> Tensor:
    if target.stride == 2 * source.stride:  # halfway between two pixels
        return F.avg_pool2d(x, 2, ceil_mode=True)
    if target.stride == source.stride:
        return x
    factor = source.stride // target.stride
    return cut(F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False), target.H, target.W)


def cut(x: Tensor, H: int, W: int) -> Tensor:
    """The upper left corner of a larger map, [B, C, H, W].

    A copy: the strides of a slice would tell `torch.compile` whether anything is cut off, for a graph each.
    """
    return F.pad(x, (0, W - x.shape[-1], 0, H - x.shape[-2]))
