"""What a training sees: images of a split as they are on disk, after the pipeline, or after each of its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from torch import Tensor

from ..errors import ConfigError, DataError
from ..preflight import check_data_is_there
from .pictures import Colour, View, draw, side_by_side

STAGES = ("original", "transformed", "pipeline")
SIDE, STEP_SIDE = 640, 320  # pixels of a picture, and of that of a step
COLUMNS = 4  # of steps


def build_dataset(cfg: Config, split: str) -> Any:
    """The data set of 'train', 'val' or 'test', with its pipeline.

    Raises:
        ConfigError: the config has no such split, or its data set cannot be built.
        DataError: there is no data, or no image in it.
    """
    loader = cfg.get(f"{split}_dataloader")
    if not loader:
        raise ConfigError(f"the config has no {split}_dataloader, expected a split that it has: --split train")
    check_data_is_there(cfg, (split,))
    init_default_scope(cfg.default_scope)
    try:
        dataset = DATASETS.build(deepcopy(loader.dataset))
        count = len(dataset)
    except Exception as error:  # data sets and transforms may raise anything
        raise ConfigError(f"{split}_dataloader.dataset cannot be built: {type(error).__name__}: {error}") from error
    if not count:
        raise DataError(f"{split}_dataloader.dataset has no image, or all of them are filtered out")
    return dataset


def leaf_of(dataset: Any, index: int) -> tuple[BaseDataset, int]:
    """The data set inside wrappers such as RepeatDataset that a sample is from, and its index there."""
    if not hasattr(dataset, "dataset") and not hasattr(dataset, "datasets"):
        return dataset, index
    inner = dataset._get_ori_dataset_idx(index) if hasattr(dataset, "_get_ori_dataset_idx") else index
    if isinstance(inner, tuple):
        return leaf_of(dataset.datasets[inner[0]], inner[1])
    return leaf_of(dataset.dataset, inner)


def load_original(dataset: Any, index: int, image: bool = True) -> dict[str, Any]:
    """A sample that only the transforms named Load... have seen; without the image, only its annotations."""
    leaf, inner = leaf_of(dataset, index)
    results = leaf.get_data_info(inner)
    if not image and "width" in results:
        results["ori_shape"] = (results["height"], results["width"])
    for transform in leaf.pipeline.transforms:
        name = type(transform).__name__
        if "Load" in name and (image or "Annotations" in name):
            results = transform(results)
    return results


def view_of(results: dict[str, Any]) -> View | None:
    """What can be seen of a sample between two transforms, or packed after the last; None before its image is loaded.

    Arrays are copied: later transforms may write into them. Regions that training ignores are left out.
    """
    if "inputs" in results:
        return _packed_view(results)
    if results.get("img") is None:
        return None
    image = displayable(results["img"])
    if results.get("gt_bboxes") is None:
        label_map = results.get("gt_seg_map")
        return View(image, label_map=None if label_map is None else np.array(label_map, dtype=np.int64))
    kept = ~np.asarray(results.get("gt_ignore_flags", np.zeros(len(results["gt_bboxes"]))), dtype=bool)
    masks = results.get("gt_masks")
    return View(
        image,
        boxes=_boxes(results["gt_bboxes"])[kept],
        labels=np.asarray(results["gt_bboxes_labels"])[kept],
        masks=None if masks is None else masks.to_ndarray()[kept].astype(bool),
    )


def _packed_view(results: dict[str, Any]) -> View:
    if not isinstance(results["inputs"], Tensor):
        raise ConfigError("the pipeline gives several images at once (test-time augmentation): --stage original")
    image, sample = displayable(results["inputs"].permute(1, 2, 0).numpy()), results["data_samples"]
    if "gt_sem_seg" in sample and "gt_instances" not in sample:
        return View(image, label_map=sample.gt_sem_seg.data.squeeze(0).long().numpy().copy())
    if "gt_instances" not in sample or "bboxes" not in sample.gt_instances:
        return View(image)
    objects = sample.gt_instances
    masks = objects.masks.to_ndarray().astype(bool) if "masks" in objects else None
    return View(image, boxes=_boxes(objects.bboxes), labels=objects.labels.numpy(), masks=masks)


def displayable(image: np.ndarray) -> np.ndarray:
    """[H, W, C] or [H, W], BGR as OpenCV reads it, of any type -> [H, W, 3] RGB uint8.

    Other ranges than 0 to 255, such as those of normalised images, are stretched to it.
    """
    image = image if image.ndim == 3 else image[..., None]
    image = np.repeat(image[..., :1], 3, axis=2) if image.shape[2] < 3 else image[..., 2::-1]
    if image.dtype != np.uint8:
        low, high = float(image.min()), float(image.max())
        if low < 0 or high > 255 or high <= 1:
            image = (image - low) / max(high - low, 1e-9) * 255
    return np.array(image, dtype=np.uint8)


def _boxes(boxes: Any) -> np.ndarray:
    """Tensors, arrays and mmdet's boxes -> [N, 4]"""
    boxes = getattr(boxes, "tensor", boxes)
    return np.array(boxes, dtype=float).reshape(-1, 4)


class Steps:
    """Watches the transforms of a data set, those of wrappers (mosaics) included, and keeps what each has made.

    Of a sample that is mixed from several images, only the steps of the first one are kept.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.taken: list[tuple[str, View]] = []
        self.first_is_done = False
        self._watch(dataset)

    def of(self, index: int) -> list[tuple[str, View]]:
        """Names and views of the steps of one sample."""
        self.taken, self.first_is_done = [], False
        self.dataset[index]
        return self.taken

    def _watch(self, dataset: Any) -> None:
        for inner in (getattr(dataset, "dataset", None), *getattr(dataset, "datasets", ())):
            if inner is not None:
                self._watch(inner)
        is_leaf = isinstance(dataset, BaseDataset)
        pipeline = dataset.pipeline.transforms if is_leaf else getattr(dataset, "pipeline", [])
        last = len(pipeline) - 1
        pipeline[:] = [Watched(each, self, is_leaf, is_leaf and i == last) for i, each in enumerate(pipeline)]

    def take(self, transform: Callable, results: dict[str, Any] | None, in_leaf: bool, is_last: bool) -> None:
        if in_leaf and self.first_is_done:
            return
        if results is None:  # refused: the data set takes another sample
            self.taken = []
            return
        view = view_of(results)
        if view is not None:
            H, W = view.image.shape[:2]
            self.taken.append((f"{type(transform).__name__}  {H} x {W}", view))
        self.first_is_done |= is_last


class Watched:
    """A transform whose results `steps` sees."""

    def __init__(self, transform: Callable, steps: Steps, in_leaf: bool, is_last: bool) -> None:
        self.transform = transform
        self.steps = steps
        self.place = (in_leaf, is_last)

    def __call__(self, results: dict[str, Any]) -> dict[str, Any] | None:
        results = self.transform(results)
        self.steps.take(self.transform, results, *self.place)
        return results

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transform, name)


def pictures(
    dataset: Any, indices: Sequence[int], stage: str, palette: Sequence[Colour]
) -> Iterator[tuple[str, Image.Image]]:
    """The name of each image's file without its ending, and its picture."""
    classes = dataset.metainfo.get("classes") or ()
    steps = Steps(dataset) if stage == "pipeline" else None
    for index in indices:
        leaf, inner = leaf_of(dataset, index)
        file = leaf.get_data_info(inner)["img_path"]
        try:
            picture = _picture(dataset, index, stage, steps, classes, palette)
        except (ConfigError, DataError):
            raise
        except Exception as error:  # transforms may raise anything
            raise DataError(
                f"sample {index} ({file}) does not go through the pipeline: {type(error).__name__}: {error}; "
                "tools/check_data.py lists every broken file of a data set"
            ) from error
        yield file.rpartition("/")[2].rpartition(".")[0], picture


def _picture(
    dataset: Any, index: int, stage: str, steps: Steps | None, classes: Sequence[str], palette: Sequence[Colour]
) -> Image.Image:
    if steps is not None:
        taken = steps.of(index)
        drawn = [draw(view, classes, palette, STEP_SIDE) for _, view in taken]
        return side_by_side(drawn, [title for title, _ in taken], columns=min(COLUMNS, len(drawn)))
    results = load_original(dataset, index) if stage == "original" else dataset[index]
    view = view_of(results)
    plain = View(view.image)
    return side_by_side([draw(each, classes, palette, SIDE) for each in (plain, view)])
