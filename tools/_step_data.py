"""Batches on the CPU, as the loader gives them: synthetic ones of the config's kind, or its own training data."""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch
from _models import Size
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.registry import FUNCTIONS, TRANSFORMS
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing
from torch.utils.data import DataLoader

from vig_backbone.openmmlab.fast_loading import pipelines
from vig_backbone.openmmlab.preflight import check_data_is_there

Batch = dict[str, Any]  # inputs and data_samples, where the config collates in no other way
Random = np.random.Generator

BATCHES = 4  # synthetic ones, in turn: the number of objects varies from step to step
MEAN_OBJECTS, MAX_OBJECTS = 7, 60  # of an image; COCO's training images have 7.3
CORNERS = 24  # of a mask's polygon
REGIONS, IGNORED_REGIONS = 24, 2  # of a label map
IGNORED = 255


class Feed:
    """Batches without end; how long each was waited for is in `waits`, in ms."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches
        self.waits: list[float] = []

    def next(self) -> Batch:
        start = time.perf_counter()
        batch = next(self.batches)
        self.waits.append((time.perf_counter() - start) * 1e3)
        return batch


def synthetic_feed(
    cfg: Config,
    size: Size,
    batch: int,
    num_classes: int | None,
    device: torch.device,
    smaller: float = 0.0,
) -> Feed:
    """The same images and objects for every model of mmdet or mmseg, packed, collated and pinned as its config says.

    Without annotations, as for testing, where `num_classes` is None. Both sides of an image are up to the share
    `smaller` smaller than `size`, so that the preprocessor has something to pad. The scope of `cfg` is the current one.
    """
    loader = cfg.test_dataloader if num_classes is None else cfg.train_dataloader
    random, transforms = np.random.default_rng(0), packing_of(loader, cfg.default_scope, num_classes is not None)
    make = detection_sample if cfg.default_scope == "mmdet" else segmentation_sample
    samples = []
    for _ in range(BATCHES * batch):
        shares = random.uniform(1 - smaller, 1, 2) if smaller else (1, 1)
        sample = make(random, tuple(round(side * share) for side, share in zip(size, shares)), num_classes)
        for transform in transforms:
            sample = transform(sample)
        samples.append(sample)
    pin = device.type == "cuda" and bool(loader.get("pin_memory"))
    return Feed(cycle([*DataLoader(samples, batch, collate_fn=collate_of(loader), pin_memory=pin)]))


def packing_of(loader: Mapping[str, Any], scope: str, training: bool) -> list[BaseTransform]:
    """Those transforms of a dataloader's pipeline that decide on the form of a sample, not on what it shows."""
    if scope == "mmdet":
        from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs

        kinds = (LoadAnnotations, PackDetInputs) if training else (PackDetInputs,)
    else:
        from mmseg.datasets.transforms import PackSegInputs

        kinds = (PackSegInputs,)
    transforms = [TRANSFORMS.build(transform) for transform in next(pipelines(loader["dataset"]))]
    return [transform for transform in transforms if isinstance(transform, kinds)]


def collate_of(loader: Mapping[str, Any]) -> Callable[[list], Batch]:
    options = dict(loader.get("collate_fn", dict(type="pseudo_collate")))
    return partial(FUNCTIONS.get(options.pop("type")), **options)


def real_feed(cfg: Config) -> Feed:
    """From the config's own train_dataloader, with its worker processes; DataError if the data are not there."""
    check_data_is_there(cfg, ("train",))
    set_multi_processing(**cfg.get("env_cfg", {}).get("mp_cfg", {}))
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    return Feed(_without_end(loader))


def _without_end(loader: DataLoader) -> Iterator[Batch]:
    while True:
        yield from loader


def _image(random: Random, size: Size) -> np.ndarray:
    return random.integers(0, 256, (*size, 3), dtype=np.uint8)


# ---- detection


def detection_sample(random: Random, size: Size, num_classes: int | None) -> dict[str, Any]:
    """An image with objects as mmdet's data sets and loading transforms give them."""
    scale = 5 / 3  # an image of 480 x 640 in COCO becomes 800 x 1067
    sample = dict(img=_image(random, size), img_id=0, img_shape=size, scale_factor=(scale, scale), flip=False)
    if num_classes is None:
        return dict(sample, ori_shape=tuple(round(side / scale) for side in size))
    boxes = random_boxes(random, size, min(int(random.geometric(1 / MEAN_OBJECTS)), MAX_OBJECTS))
    instances = [
        dict(bbox=box.tolist(), bbox_label=int(random.integers(num_classes)), mask=[ellipse(box)], ignore_flag=0)
        for box in boxes
    ]
    return dict(sample, ori_shape=size, instances=instances)


def random_boxes(random: Random, size: Size, count: int) -> np.ndarray:
    """x1, y1, x2, y2 within the image, float32 [count, 4]; their side is log-uniform, from 3 to 90% of the image's."""
    H, W = size
    side = (H * W) ** 0.5 * np.exp(random.uniform(np.log(0.03), np.log(0.9), count))
    stretch = np.exp(random.normal(0, 0.3, count))
    extent = np.clip(np.stack((side * stretch, side / stretch), -1), 4, (W, H))  # [count, 2]
    corner = random.uniform(0, 1, (count, 2)) * ((W, H) - extent)
    return np.concatenate((corner, corner + extent), -1).astype(np.float32)


def ellipse(box: np.ndarray) -> list[float]:
    """A polygon in the box, x and y in turn."""
    angles = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    around = np.stack((np.cos(angles), np.sin(angles)), -1)  # [CORNERS, 2]
    return ((box[:2] + box[2:]) / 2 + around * (box[2:] - box[:2]) / 2).ravel().tolist()


# ---- segmentation


def segmentation_sample(random: Random, size: Size, num_classes: int | None) -> dict[str, Any]:
    """An image with labels as mmseg's loading transforms give them; one for testing was a third wider originally."""
    H, W = size
    sample = dict(img=_image(random, size), img_shape=size, pad_shape=size, flip=False, reduce_zero_label=True)
    if num_classes is None:
        return dict(sample, ori_shape=(H, round(W * 4 / 3)), scale_factor=(W / round(W * 4 / 3), 1.0))
    return dict(sample, ori_shape=size, scale_factor=(1.0, 1.0), gt_seg_map=label_map(random, size, num_classes))


def label_map(random: Random, size: Size, num_classes: int) -> np.ndarray:
    """Regions, each of what is nearest to one of some points, of random classes; some are ignored. uint8 [H, W]"""
    centres = random.uniform(0, 1, (REGIONS, 2)) * size
    classes = random.integers(0, num_classes, REGIONS)
    classes[:IGNORED_REGIONS] = IGNORED
    y, x = np.arange(size[0])[:, None], np.arange(size[1])
    nearest, labels = np.full(size, np.inf), np.zeros(size, np.uint8)
    for (row, column), class_ in zip(centres, classes):
        distance = (y - row) ** 2 + (x - column) ** 2
        labels[distance < nearest] = class_
        nearest = np.minimum(nearest, distance)
    return labels
