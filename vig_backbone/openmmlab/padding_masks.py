"""Necks and dense heads that see an image in a padded batch as they see it alone."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd

from ..padding import at_stride, attached_valid_sizes, valid_mask


class PaddingMasks:
    """Clears the padding in front of everything in some modules that looks at the neighbours of a pixel.

    A stride-4 map of a 1x1 convolution is not zero where the image is padded, and a 3x3 convolution behind it brings
    that into the image. What it would see past the end of a map of the image alone is zero; so is, here, the padding.

    `sizes` are height and width of each image of the batch, [B, 2], in pixels; None where none of them is padded.

    Args:
        modules: their convolutions and poolings, at any depth, get a hook; parameters and names stay as they are.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._images: tuple[int, int] | None = None
        self.sizes: Tensor | None = None
        self._masks: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for module in modules:
            for layer in module.modules():
                if looks_at_neighbours(layer):
                    layer.register_forward_pre_hook(self._clear)

    def set_images(self, images: Tensor) -> None:
        """The batch [B, 3, H, W] from which the next maps come, and the sizes that came along with it."""
        self._images, self.sizes = tuple(images.shape[-2:]), attached_valid_sizes(images)
        self._masks.clear()

    def _padding_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The valid sizes [B, 2] of a map [B, C, H, W], whose stride its size tells, and where it is padding.

        Made once a batch and size: of the small operators of a mask, every one is a launch.
        """
        size = tuple(x.shape[-2:])
        if size not in self._masks:
            sizes = at_stride(self.sizes, stride_of(self._images, size))
            self._masks[size] = sizes, ~valid_mask(sizes, *size)[:, None]
        return self._masks[size]

    def extended(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps whose last row and column of image stand in the padding once more.

        RoIAlign reads half a pixel past the end of an image. Past the end of a map it takes the last pixel.
        """
        if self.sizes is None:
            return tuple(maps)
        return tuple(_repeat_edges(x, self._padding_of(x)[0]) for x in maps)

    def _clear(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.sizes is None:
            return inputs
        x, *rest = inputs
        return (x.masked_fill(self._padding_of(x)[1], 0.0), *rest)


def looks_at_neighbours(layer: nn.Module) -> bool:
    """Whether a pixel of its output depends on pixels of other strides' cells: convolutions larger than 1, poolings."""
    if isinstance(layer, _ConvTransposeNd):
        return any(size > step for size, step in zip(layer.kernel_size, layer.stride))
    return isinstance(layer, (_MaxPoolNd, _AvgPoolNd)) or (isinstance(layer, _ConvNd) and max(layer.kernel_size) > 1)


def stride_of(images: tuple[int, int], size: tuple[int, int]) -> int:
    """The stride, a power of two, at which images of a certain height and width have a map of `size`.

    Raises:
        ValueError: there is none.
    """
    stride = 1
    while any(-(-image // stride) > each for image, each in zip(images, size)):
        stride *= 2
    if any(-(-image // stride) != each for image, each in zip(images, size)):
        raise ValueError(
            f"a map of {size[0]}x{size[1]} is at no stride of images of {images[0]}x{images[1]} pixels, so its padding "
            "is not known: set model.data_preprocessor.valid_sizes=False for this neck or head"
        )
    return stride


def _repeat_edges(x: Tensor, sizes: Tensor) -> Tensor:
    for dim in (2, 3):
        end = sizes[:, dim - 2].view(-1, 1, 1, 1)
        shape = list(x.shape)
        shape[dim] = 1
        last = x.gather(dim, (end - 1).expand(shape))
        places = torch.arange(x.shape[dim], device=x.device).view([-1 if i == dim else 1 for i in range(4)])
        x = last.where(places == end, x)
    return x
