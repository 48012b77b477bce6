"""Detection data that travel light: masks as run lengths, images as they were decoded, normalised on the device.

Drop-in replacements of mmdet's transforms and preprocessor of similar names, with equal results; `fast_loading` names
them and puts them into a config.
"""

from __future__ import annotations

import pycocotools.mask
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmengine.model import ImgDataPreprocessor
from torch import Tensor

from .image_sizes import attach_sizes, image_sizes
from .image_tensors import image_tensor, normalized, padded_stack
from .packed_batch import OnDevice, PackedBatch
from .run_masks import RunMasks

Segmentation = list | dict


def run_counts(segmentation: Segmentation, height: int, width: int) -> str | bytes | list[int]:
    """COCO's run lengths of a polygon, or of run lengths of either kind.

    Raises:
        ValueError: for run lengths of another image size.
    """
    if isinstance(segmentation, list):
        parts = pycocotools.mask.frPyObjects(segmentation, height, width)
        return pycocotools.mask.merge(parts)["counts"]
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"a mask of {segmentation['size']} (height, width) in an image of {[height, width]}")
    return segmentation["counts"]


class FastLoadDetAnnotations(LoadAnnotations):
    """mmdet's LoadAnnotations, which gives masks as RunMasks (polygons, both kinds of RLE, crowds alike)."""

    def _load_masks(self, results: dict) -> None:
        if not self.poly2mask:
            super()._load_masks(results)
            return
        shape = results["ori_shape"]
        counts = [run_counts(mask, *shape) for mask in self._process_masks(results)]
        results["gt_masks"] = RunMasks.from_counts(counts, shape)


class FastPackDetInputs(PackDetInputs):
    """mmdet's PackDetInputs; the image is a view [C, H, W] of the decoded [H, W, C]."""

    def transform(self, results: dict) -> dict:
        packed = super().transform({key: value for key, value in results.items() if key != "img"})
        return {"inputs": image_tensor(results["img"]), **packed} if "img" in results else packed


class BatchedImages(ImgDataPreprocessor):
    """mmengine's ImgDataPreprocessor with a constant number of operations for a batch but for the padding."""

    def cast_data(self, data: dict) -> dict:
        return data if isinstance(data, OnDevice) else super().cast_data(data)

    def forward(self, data: dict, training: bool = False) -> dict:
        data = self.cast_data(data)
        images = data["inputs"]
        if isinstance(images, Tensor) or len({image.dtype for image in images}) > 1:
            return super().forward(data, training)
        C = images[0].shape[0]
        if self._enable_normalize and len(self.mean) not in (1, C):
            raise ValueError(f"data_preprocessor.mean has {len(self.mean)} values for images of {C} channels")
        data["inputs"] = normalized(
            padded_stack(images, self.pad_size_divisor),
            [image.shape[1:] for image in images],
            self._channel_conversion,
            (self.mean, self.std) if self._enable_normalize else None,
            self.pad_value,
        )
        data.setdefault("data_samples", None)
        return data


class FastDetPreprocessor(DetDataPreprocessor, BatchedImages):
    """mmdet's DetDataPreprocessor, equal in fp32: a packed batch moves in one transfer and is normalised in one go.

    Args:
        valid_sizes: the batch takes the sizes of its images along (`vig_backbone.padding`), so that backbones of this
            package, and BatchedMaskRCNN and its like, tell padding from image. All others are as ever.
    """

    def __init__(self, *args, valid_sizes: bool = True, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.valid_sizes = valid_sizes

    def forward(self, data: dict, training: bool = False) -> dict:
        if isinstance(data, PackedBatch):
            data = data.unpacked_on(self.device)
        sizes = image_sizes(data["inputs"])
        data = super().forward(data, training)
        if self.valid_sizes:
            if training and self.batch_augments is not None:
                sizes = [sample.img_shape for sample in data["data_samples"]]  # they may resize
            attach_sizes(data["inputs"], sizes)
        return data
