"""Check the data against the model before and while it is used, with errors that name files and fields."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from .errors import ConfigError, DataError

FILE_FIELDS = ("img_path", "seg_map_path")
IGNORE_LABEL = 255


@dataclass
class CheckedPipeline:
    """A data pipeline that checks its results, and whose errors name the files of the sample.

    num_classes: labels of semantic maps must be below it; min_size: least height and width of the image in pixels.
    """

    pipeline: Callable[[dict], dict | None]
    num_classes: int | None = None
    min_size: int = 1

    def __call__(self, sample: dict) -> dict | None:
        # Transforms add to the dict that they are given: take the names first.
        files = {field: sample[field] for field in FILE_FIELDS if sample.get(field)}
        try:
            result = self.pipeline(sample)
            if isinstance(result, dict):
                self._check(result)
            return result
        except Exception as error:
            names = ", ".join(f"{field}={name}" for field, name in files.items()) or "unknown files"
            raise DataError(
                f"cannot use the sample {names}: {type(error).__name__}: {error}. Replace or remove it; "
                "tools/check_data.py lists every broken file of a data set"
            ) from error

    def _check(self, result: dict) -> None:
        image = result.get("inputs")
        if isinstance(image, torch.Tensor) and min(image.shape[-2:]) < self.min_size:
            H, W = image.shape[-2:]
            raise ValueError(f"the image of {H}x{W} pixels is smaller than a patch, {self.min_size} pixels a side")
        labels = getattr(result.get("data_samples"), "gt_sem_seg", None)
        if labels is not None and self.num_classes is not None:
            limit = min(self.num_classes, torch.iinfo(labels.data.dtype).max)
            wrong = (labels.data >= limit) & (labels.data != IGNORE_LABEL)
            if wrong.any():
                largest = int(labels.data[wrong].max())
                raise ValueError(f"label {largest} in a set of {self.num_classes} classes (counted from 0)")

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "pipeline":  # not there yet while a worker unpickles this object
            raise AttributeError(name)
        return getattr(self.pipeline, name)


class CheckDataHook(Hook):
    """Before training, validation and testing: no empty data set, and as many classes in the data as in the heads.

    Also wraps the pipelines in :class:`CheckedPipeline`, before the first worker process starts.

    Raises:
        DataError: for a data set without a single usable image.
        ConfigError: if a head's `num_classes` is not the data set's number of classes.
    """

    priority = "VERY_HIGH"

    def before_train(self, runner: Runner) -> None:
        self._check(runner, runner.train_dataloader.dataset, "train_dataloader")
        if runner.val_loop is not None:
            self._check(runner, runner.val_dataloader.dataset, "val_dataloader")

    def before_val(self, runner: Runner) -> None:
        self._check(runner, runner.val_dataloader.dataset, "val_dataloader")

    def before_test(self, runner: Runner) -> None:
        self._check(runner, runner.test_dataloader.dataset, "test_dataloader")

    def _check(self, runner: Runner, dataset: object, field: str) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if len(dataset) == 0:
            leaf = next(leaves(dataset))
            where = ", ".join(
                f"{name}={getattr(leaf, name)}"
                for name in ("data_root", "ann_file", "data_prefix")
                if hasattr(leaf, name)
            )
            raise DataError(
                f"{field}: no usable image in {type(leaf).__name__} ({where}): the annotation is empty, every image "
                "was filtered out, or the class names do not match. tools/check_data.py looks into the files"
            )
        for leaf in leaves(dataset):
            classes = leaf.metainfo.get("classes")
            if classes is not None:
                check_num_classes(model, classes, field)
            if not isinstance(leaf.pipeline, CheckedPipeline):
                leaf.pipeline = CheckedPipeline(
                    leaf.pipeline, None if classes is None else len(classes), _least_size(model)
                )


def check_num_classes(model: nn.Module, classes: tuple[str, ...], field: str) -> None:
    """Raise ConfigError unless every classifying head of the model has as many classes as the data set."""
    if isinstance(classes, str):
        raise ConfigError(f"{field}.dataset.metainfo.classes is the text {classes!r}: a single class is ({classes!r},)")
    for name, module in model.named_modules():
        count = getattr(module, "num_classes", None)
        is_head = name.rpartition(".")[2].endswith(("_head", "head")) or "_head." in name
        # An RPN tells objects from background; a semantic branch has classes of its own.
        if not is_head or not isinstance(count, int) or name.endswith(("rpn_head", "semantic_head")):
            continue
        if count != len(classes):
            raise ConfigError(
                f"model.{name}.num_classes={count}, but {field}.dataset has {len(classes)} classes "
                f"({', '.join(classes[:4])}{', ...' if len(classes) > 4 else ''}): set model.{name}.num_classes="
                f"{len(classes)}, or {field}.dataset.metainfo.classes to the classes of the head"
            )


def leaves(dataset: object):
    """The data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    inner = [d for d in (getattr(dataset, "dataset", None), *getattr(dataset, "datasets", ())) if d is not None]
    for child in inner:
        yield from leaves(child)
    if not inner and callable(getattr(dataset, "pipeline", None)):
        yield dataset


def _least_size(model: nn.Module) -> int:
    """Pixels that the backbone needs on each side, or 1 where the preprocessor pads to more."""
    least = getattr(getattr(model, "backbone", None), "min_image_size", 1)
    preprocessor = getattr(model, "data_preprocessor", None)
    divisor = getattr(preprocessor, "pad_size_divisor", None) or getattr(preprocessor, "size_divisor", None) or 1
    size = min(getattr(preprocessor, "size", None) or (1,))
    return least if max(divisor, size) < least else 1
