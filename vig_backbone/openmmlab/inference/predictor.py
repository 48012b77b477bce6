"""A trained model of a config as a function from images to results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.structures import BaseDataElement
from torch import Tensor

from ..configuration import load_config, use_tta
from ..errors import ConfigError, DataError
from .images import ImageError, as_rgb, read_image
from .model import TASKS, find_device, load_model
from .pipeline import ImagePipeline, use_window
from .results import Detections, LabelMap, Result

Picture = str | Path | np.ndarray
AMP_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Predictor:
    """A detector or segmenter with trained weights; call it with images to get a result for each, in their order.

    Attributes: `task`, "detection" or "segmentation"; `classes`, their names; `palette`, the colour of each in RGB.

    Args:
        config: a file, or a config that is loaded. It says how an image is prepared (its test pipeline), too.
        checkpoint: file or URL; all of its weights must fit.
        data, options: laid over a config that is a file, as `--data` and `--cfg-options` of the tools.
        device: "cpu", "cuda" or "cuda:N"; by default a GPU where there is one.
        amp: automatic mixed precision in "bfloat16" or "float16".
        tta: test-time augmentation as the config describes it. Detectors give boxes without masks then.
        window: segment images at their own resolution, in windows of so many pixels a side that overlap by a third.

    Raises:
        ConfigError: a config or setting that cannot work.
        CheckpointError: no checkpoint, or one that does not fit the config.
    """

    def __init__(
        self,
        config: str | Path | Config,
        checkpoint: str | Path,
        *,
        data: str | None = None,
        options: dict[str, Any] | None = None,
        device: str | None = None,
        amp: str | None = None,
        tta: bool = False,
        window: int | None = None,
    ) -> None:
        if isinstance(config, Config) and (data or options):
            raise ConfigError("data and options are laid over a config that is a file; this one is loaded already")
        cfg = deepcopy(config) if isinstance(config, Config) else load_config(config, data, options)
        if amp is not None and amp not in AMP_TYPES:
            raise ConfigError(f"amp={amp!r}: expected one of {', '.join(map(repr, AMP_TYPES))}")
        if window is not None:
            use_window(cfg, window)
        if tta:
            use_tta(cfg)
        self.task = TASKS[cfg.default_scope]
        self.device = find_device(device)
        self.model, classes = load_model(cfg, str(checkpoint), self.device)
        self.classes, self.palette = classes.names, classes.palette
        self._pipeline = ImagePipeline(cfg)
        self._amp = AMP_TYPES.get(amp)
        backbone = getattr(getattr(self.model, "module", self.model), "backbone", None)
        # Detectors pad what they are given to whole strides.
        self._least_side = getattr(backbone, "min_image_size", 1) if self.task == "segmentation" else 1

    def __call__(self, images: Picture | Iterable[Picture], batch_size: int = 1) -> list[Result]:
        """Results for files, or arrays [H, W, 3] uint8 in **RGB** order.

        Raises:
            ImageError: an image cannot be read or used.
        """
        return list(self.stream(images, batch_size))

    def stream(self, images: Picture | Iterable[Picture], batch_size: int = 1) -> Iterator[Result]:
        """The same one after the other, with one batch of images in memory."""
        images = iter([images] if isinstance(images, Picture) else images)
        while batch := list(islice(images, batch_size)):
            yield from self.predict([self.prepare(_loaded(image)) for image in batch])

    def prepare(self, image: np.ndarray) -> dict[str, Any]:
        """An RGB image [H, W, 3] uint8 as a sample for `predict`; safe to call in several threads.

        Raises:
            ImageError: too small for the model, or refused by the pipeline.
        """
        try:
            sample = self._pipeline(image)
        except Exception as error:  # transforms are the config's, and raise anything
            raise ImageError(f"the test pipeline cannot prepare it ({type(error).__name__}: {error})") from error
        inputs = sample["inputs"]
        H, W = (inputs[0] if isinstance(inputs, list) else inputs).shape[-2:]
        if min(H, W) < self._least_side:
            raise ImageError(f"{W} x {H} pixels after the test pipeline, the model needs {self._least_side} a side")
        return sample

    @torch.no_grad()
    def predict(self, samples: Sequence[dict[str, Any]]) -> list[Result]:
        """Results for samples of `prepare`, all in one batch, or one for each size where the model needs that."""
        results: dict[int, Result] = {}
        for indices in self._groups(samples):
            try:
                with torch.autocast(self.device.type, self._amp, enabled=self._amp is not None):
                    outputs = self.model.test_step(pseudo_collate([samples[i] for i in indices]))
            except torch.OutOfMemoryError as error:
                raise DataError(
                    f"the memory of {self.device} does not hold a batch of {len(indices)} such images: try a smaller "
                    "batch (--batch-size), mixed precision (--amp), or windows for segmentation (--window)"
                ) from error
            results.update(zip(indices, map(self._result, outputs)))
        return [results[i] for i in range(len(samples))]

    def _groups(self, samples: Sequence[dict[str, Any]]) -> list[list[int]]:
        """mmseg takes images of one size alone in a batch, mmdet pads."""
        if self.task == "detection":
            return [list(range(len(samples)))] if samples else []
        groups: dict[Any, list[int]] = {}
        for i, sample in enumerate(samples):
            inputs = sample["inputs"]
            shapes = [each.shape for each in inputs] if isinstance(inputs, list) else inputs.shape
            groups.setdefault(str(shapes), []).append(i)
        return list(groups.values())

    def _result(self, sample: BaseDataElement) -> Result:
        if self.task == "segmentation":
            dtype = np.uint8 if len(self.classes) <= 256 else np.uint16
            return LabelMap(sample.pred_sem_seg.data[0].cpu().numpy().astype(dtype), self.classes)
        found = sample.pred_instances
        boxes, scores = found.bboxes.float().cpu().numpy(), found.scores.float().cpu().numpy()
        order = np.argsort(-scores, kind="stable")
        rles = _run_lengths(found.masks) if "masks" in found else None
        return Detections(
            boxes=boxes[order],
            scores=scores[order],
            labels=found.labels.cpu().numpy()[order],
            rles=None if rles is None else [rles[i] for i in order],
            size=tuple(sample.ori_shape),
            classes=self.classes,
        )


def _loaded(image: Picture) -> np.ndarray:
    if isinstance(image, np.ndarray):
        return as_rgb(image)
    try:
        return read_image(image)
    except ImageError as error:
        raise ImageError(f"{image}: {error}") from error


def _run_lengths(masks: Tensor) -> list[dict]:
    """[N, H, W] bool, one at a time: together they may be larger than the images a hundred times."""
    from pycocotools import mask

    return [mask.encode(np.asfortranarray(each.cpu().numpy().astype(np.uint8))) for each in masks]
