"""Segmentation data that travel light: 8-bit labels, colours changed by tables, normalisation on the device.

Drop-in replacements of mmseg's transforms and preprocessor of similar names, with equal results and the same draws of
random numbers; `fast_loading` names them and puts them into a config.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from mmcv.transforms.utils import cache_randomness
from mmengine.structures import PixelData
from mmseg.datasets.transforms import PackSegInputs, PhotoMetricDistortion, RandomCrop
from mmseg.models.data_preprocessor import SegDataPreProcessor
from mmseg.utils import stack_batch
from numpy import random
from torch import Tensor

from .image_sizes import attach_sizes, image_sizes
from .image_tensors import contiguous, image_tensor, normalized
from .packed_batch import OnDevice, PackedBatch

FLOAT_COUNTS = 2**24  # OpenCV counts in float32
Box = tuple[int, int, int, int]  # y1, y2, x1, x2


def label_counts(labels: np.ndarray) -> np.ndarray:
    """How often each of the labels 0 to 255 occurs, [256]. labels: [H, W] uint8."""
    if labels.size >= FLOAT_COUNTS:
        return np.bincount(labels.ravel(), minlength=256)
    return cv2.calcHist([labels], [0], None, [256], [0, 256]).ravel().astype(np.int64)


class FastRandomCrop(RandomCrop):
    """mmseg's RandomCrop, which sorts the labels of every crop that it tries; this one counts them."""

    @cache_randomness
    def crop_bbox(self, results: dict) -> Box:
        box = self._draw(results["img"])
        if self.cat_max_ratio < 1.0:
            for _ in range(10):
                if self._is_varied(self.crop(results["gt_seg_map"], box)):
                    break
                box = self._draw(results["img"])
        return box

    def _draw(self, image: np.ndarray) -> Box:
        y, x = (random.randint(0, max(image.shape[i] - self.crop_size[i], 0) + 1) for i in (0, 1))
        return y, y + self.crop_size[0], x, x + self.crop_size[1]

    def _is_varied(self, labels: np.ndarray) -> bool:
        """More than one class, and none above the allowed share."""
        if labels.dtype == np.uint8 and labels.ndim == 2:
            counts = label_counts(labels)
            if 0 <= self.ignore_index < len(counts):
                counts[self.ignore_index] = 0
        else:
            values, counts = np.unique(labels, return_counts=True)
            counts = counts[values != self.ignore_index]
        return np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < self.cat_max_ratio


class FastPhotoMetricDistortion(PhotoMetricDistortion):
    """mmseg's PhotoMetricDistortion with tables of 256 values in place of floating-point images."""

    def transform(self, results: dict) -> dict:
        if results["img"].dtype != np.uint8:
            raise TypeError(f"PhotoMetricDistortion changes uint8 images, not {results['img'].dtype}")
        results["img"] = contiguous(results["img"])
        return super().transform(results)

    def convert(self, img: np.ndarray, alpha: float = 1, beta: float = 0) -> np.ndarray:
        return cv2.LUT(img, super().convert(np.arange(256, dtype=np.uint8), alpha, beta))

    def saturation(self, img: np.ndarray) -> np.ndarray:
        if random.randint(2):
            factor = random.uniform(self.saturation_lower, self.saturation_upper)
            img = changed_hsv(img, 1, super().convert(np.arange(256, dtype=np.uint8), alpha=factor))
        return img

    def hue(self, img: np.ndarray) -> np.ndarray:
        if random.randint(2):
            shift = random.randint(-self.hue_delta, self.hue_delta)
            img = changed_hsv(img, 0, ((np.arange(256) + shift) % 180).astype(np.uint8))
        return img


def changed_hsv(image: np.ndarray, channel: int, table: np.ndarray) -> np.ndarray:
    """[H, W, 3] BGR, one of hue, saturation and value looked up in a table of 256."""
    tables = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    tables[0, :, channel] = table
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
    return cv2.cvtColor(cv2.LUT(hsv, tables, dst=hsv), cv2.COLOR_HSV2BGR, dst=hsv)


class FastPackSegInputs(PackSegInputs):
    """mmseg's PackSegInputs; the image is a view [C, H, W] of the decoded [H, W, C], and 8-bit labels stay 8-bit.

    Needs `FastSegPreprocessor`, which widens them.
    """

    def transform(self, results: dict) -> dict:
        labels = results.get("gt_seg_map")
        light = isinstance(labels, np.ndarray) and labels.dtype == np.uint8 and labels.ndim == 2
        left_out = ("img", "gt_seg_map") if light else ("img",)
        packed = super().transform({key: value for key, value in results.items() if key not in left_out})
        if light:
            packed["data_samples"].gt_sem_seg = PixelData(data=torch.from_numpy(contiguous(labels))[None])
        return {"inputs": image_tensor(results["img"]), **packed} if "img" in results else packed


class FastSegPreprocessor(SegDataPreProcessor):
    """mmseg's SegDataPreProcessor, equal in fp32: a packed batch moves in one transfer and is normalised in one go.

    Args:
        valid_sizes: the batch takes the sizes of its images along (`vig_backbone.padding`), so that backbones of this
            package tell padding from image. All others are as ever.
    """

    def __init__(self, *args, valid_sizes: bool = True, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.valid_sizes = valid_sizes

    def cast_data(self, data: dict) -> dict:
        if isinstance(data, PackedBatch):
            data = data.unpacked_on(self.device)
        return data if isinstance(data, OnDevice) else super().cast_data(data)

    def forward(self, data: dict, training: bool = False) -> dict:
        data = OnDevice(self.cast_data(data))
        sizes = image_sizes(data["inputs"])
        data = self._batch(data, training)
        if self.valid_sizes and not (training and self.batch_augments is not None):
            attach_sizes(data["inputs"], sizes)
        return data

    def _batch(self, data: dict, training: bool) -> dict:
        widen_labels(data.get("data_samples") or [])
        images = data["inputs"]
        if not training or isinstance(images, Tensor) or len({image.dtype for image in images}) > 1:
            return super().forward(data, training)
        if data.get("data_samples") is None:
            raise ValueError("training needs data_samples with labels: the batch has none")
        batch, samples = stack_batch(
            images, data["data_samples"], self.size, self.size_divisor, pad_val=0, seg_pad_val=self.seg_pad_val
        )
        reverse = self.channel_conversion and batch.shape[1] == 3
        scale = (self.mean, self.std) if self._enable_normalize else None
        batch = normalized(batch, [image.shape[1:] for image in images], reverse, scale, self.pad_val)
        if self.batch_augments is not None:
            batch, samples = self.batch_augments(batch, samples)
        return {"inputs": batch, "data_samples": samples}


def widen_labels(samples: list) -> None:
    """8-bit label maps to the 64-bit ones that losses take, those of one size in one operation."""
    maps = [sample.gt_sem_seg for sample in samples if "gt_sem_seg" in sample]
    maps = [each for each in maps if each.data.dtype == torch.uint8]
    if not maps:
        return
    same = len({each.data.shape for each in maps}) == 1
    wide = torch.stack([each.data for each in maps]).long() if same else [each.data.long() for each in maps]
    for each, data in zip(maps, wide):
        each.data = data
