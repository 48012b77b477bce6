"""Instance masks as a tensor: they travel through shared memory, move to the device once, and are cropped there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from mmcv.ops.roi_align import roi_align
from mmdet.structures.bbox import BaseBoxes
from mmdet.structures.mask import BaseInstanceMasks, BitmapMasks
from torch import Tensor

Index = int | slice | list | np.ndarray | Tensor


class TensorMasks(BaseInstanceMasks):
    """The masks of one image as a tensor, with the results of mmdet's BitmapMasks.

    data: [N, H, W], 0 or 1, uint8 as a rule (`crop_and_resize` gives bool or floating point, as BitmapMasks' does).
    """

    def __init__(self, data: Tensor) -> None:
        if not isinstance(data, Tensor) or data.dim() != 3:
            found = f"a tensor {tuple(data.shape)}" if isinstance(data, Tensor) else type(data).__name__
            raise ValueError(
                f"masks must be a tensor [N, H, W], not {found}; TensorMasks.from_bitmaps takes BitmapMasks"
            )
        self.data = data

    @staticmethod
    def from_bitmaps(masks: BitmapMasks) -> TensorMasks:
        """The same masks; their memory is shared."""
        return TensorMasks(torch.from_numpy(masks.masks))

    def to_bitmaps(self) -> BitmapMasks:
        return BitmapMasks(self.to_ndarray(), self.height, self.width)

    @property
    def height(self) -> int:
        return self.data.shape[1]

    @property
    def width(self) -> int:
        return self.data.shape[2]

    @property
    def device(self) -> torch.device:
        return self.data.device

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Index) -> TensorMasks:
        """The masks of an index along N; a single integer keeps the dimension."""
        if isinstance(index, np.ndarray | list):
            index = torch.as_tensor(np.asarray(index, dtype=None if len(index) else np.int64), device=self.device)
        return TensorMasks(self.data[index].reshape(-1, self.height, self.width))

    def __iter__(self):
        return iter(self.data)

    def __repr__(self) -> str:
        size = f"num_masks={len(self)}, height={self.height}, width={self.width}"
        return f"TensorMasks({size}, device={str(self.device)!r})"

    # `to` makes mmengine's data elements move the masks with their tensors, `pin_memory` is called by PyTorch's loader.

    def to(self, *args, **kwargs) -> TensorMasks:
        """As Tensor.to; a new object."""
        return TensorMasks(self.data.to(*args, **kwargs))

    def pin_memory(self) -> TensorMasks:
        return TensorMasks(self.data.pin_memory())

    def crop_and_resize(
        self,
        bboxes: np.ndarray | Tensor,
        out_shape: tuple[int, int],
        inds: np.ndarray | Tensor,
        device: str | torch.device | None = None,
        interpolation: str = "bilinear",
        binarize: bool = True,
    ) -> TensorMasks:
        """Mask inds[k] inside bboxes[k], resized to out_shape by RoIAlign, for each k.

        Equal to BitmapMasks.crop_and_resize, but without its copy of a whole mask for every box, and nothing goes
        through the host.

        Args:
            bboxes: [K, 4] x1, y1, x2, y2 in pixels.
            inds: [K] integers.
            device: where to compute; by default where the masks are.
            interpolation: not used, as in BitmapMasks.
            binarize: give bool, the average of the samples at least 0.5; else the average, in the type of `bboxes`.
        """
        device = self.device if device is None else device
        if len(self) == 0 or len(bboxes) == 0:
            return TensorMasks(torch.empty((0, *out_shape), dtype=torch.uint8, device=device))
        boxes, inds = (torch.as_tensor(x).to(device) for x in (bboxes, inds))
        rois = torch.cat([inds[:, None].to(boxes.dtype), boxes], 1)  # [K, 5]
        masks = self.data.to(device)[:, None].to(rois.dtype)  # [N, 1, H, W]
        cropped = roi_align(masks, rois, out_shape, 1.0, 0, "avg", True).squeeze(1)
        return TensorMasks(cropped >= 0.5 if binarize else cropped)

    def flip(self, flip_direction: str = "horizontal") -> TensorMasks:
        dims = {"horizontal": (2,), "vertical": (1,), "diagonal": (1, 2)}
        if flip_direction not in dims:
            raise ValueError(f"flip_direction={flip_direction!r}, expected one of {', '.join(dims)}")
        return TensorMasks(self.data.flip(dims[flip_direction]))

    def pad(self, out_shape: tuple[int, int], pad_val: int = 0) -> TensorMasks:
        """Filled up below and to the right; a mask that is larger stays as it is."""
        below, right = (max(new - old, 0) for new, old in zip(out_shape, self.data.shape[1:]))
        return TensorMasks(F.pad(self.data, (0, right, 0, below), value=pad_val))

    def crop(self, bbox: np.ndarray) -> TensorMasks:
        """bbox: integers x1, y1, x2, y2; clipped to the masks, and at least one pixel a side."""
        x1, x2 = np.clip(bbox[0::2], 0, self.width).tolist()
        y1, y2 = np.clip(bbox[1::2], 0, self.height).tolist()
        return TensorMasks(self.data[:, y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)])

    def to_ndarray(self) -> np.ndarray:
        return self.data.cpu().numpy()

    def to_tensor(self, dtype: torch.dtype, device: str | torch.device) -> Tensor:
        """A copy, whatever the arguments, as BitmapMasks gives one."""
        return self.data.to(dtype=dtype, device=device, copy=True)

    @property
    def areas(self) -> np.ndarray:
        return self.data.sum((1, 2)).cpu().numpy()

    def get_bboxes(self, dst_type: str = "hbb") -> BaseBoxes:
        """The smallest boxes around the masks."""
        return self.to_bitmaps().get_bboxes(dst_type)

    @staticmethod
    def cat(masks: Sequence[TensorMasks]) -> TensorMasks:
        """All masks in one; they must have one size."""
        if not masks:
            raise ValueError("no masks to put together: expected at least one TensorMasks")
        return TensorMasks(torch.cat([mask.data for mask in masks]))

    # What only augmentations on the CPU need is BitmapMasks' own.

    def rescale(self, scale: tuple[int, int], interpolation: str = "nearest") -> TensorMasks:
        return self.from_bitmaps(self.to_bitmaps().rescale(scale, interpolation))

    def resize(self, out_shape: tuple[int, int], interpolation: str = "nearest") -> TensorMasks:
        return self.from_bitmaps(self.to_bitmaps().resize(out_shape, interpolation))

    def expand(self, expanded_h: int, expanded_w: int, top: int, left: int) -> TensorMasks:
        return self.from_bitmaps(self.to_bitmaps().expand(expanded_h, expanded_w, top, left))

    def translate(
        self,
        out_shape: tuple[int, int],
        offset: int | float,
        direction: str = "horizontal",
        border_value: int = 0,
        interpolation: str = "bilinear",
    ) -> TensorMasks:
        return self.from_bitmaps(self.to_bitmaps().translate(out_shape, offset, direction, border_value, interpolation))

    def shear(
        self,
        out_shape: tuple[int, int],
        magnitude: float,
        direction: str = "horizontal",
        border_value: int = 0,
        interpolation: str = "bilinear",
    ) -> TensorMasks:
        return self.from_bitmaps(self.to_bitmaps().shear(out_shape, magnitude, direction, border_value, interpolation))

    def rotate(
        self,
        out_shape: tuple[int, int],
        angle: float,
        center: tuple[float, float] | None = None,
        scale: float = 1.0,
        border_value: int = 0,
        interpolation: str = "bilinear",
    ) -> TensorMasks:
        return self.from_bitmaps(self.to_bitmaps().rotate(out_shape, angle, center, scale, border_value, interpolation))
