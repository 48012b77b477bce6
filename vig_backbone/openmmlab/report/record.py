"""Metrics without a number of their own: they keep what the model predicted for each image, for the report.

They stand beside the metrics of a config, so that one evaluation gives both, also on several processes.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from torch import Tensor

from ..errors import DataError


class RecordMetric(BaseMetric):
    """Writes one pickle file, {"classes": names, "palette": colours or None, "images": what `process` has kept}."""

    def __init__(self, out_file: str, collect_device: str = "cpu") -> None:
        super().__init__(collect_device=collect_device)
        self.out_file = out_file

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        meta = self.dataset_meta or {}
        content = {"classes": list(meta.get("classes", ())), "palette": meta.get("palette"), "images": results}
        Path(self.out_file).write_bytes(pickle.dumps(content))
        return {}


@METRICS.register_module(force=True)
class RecordSegmentation(RecordMetric):
    """Per image: its path, truth and prediction as PNG files in memory, and which pairs of them its pixels have.

    Args:
        ignore_index: label of pixels that do not count.
    """

    def __init__(self, out_file: str, ignore_index: int = 255, collect_device: str = "cpu") -> None:
        super().__init__(out_file, collect_device)
        self.ignore_index = ignore_index

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        classes = len(self.dataset_meta["classes"])
        for sample in data_samples:
            _require(sample, "pred_sem_seg", "gt_sem_seg")
            prediction = sample["pred_sem_seg"]["data"].squeeze()  # [H, W]
            truth = sample["gt_sem_seg"]["data"].squeeze().to(prediction)
            pairs, pixels = count_pairs(truth, prediction, classes, self.ignore_index)
            self.results.append(
                dict(
                    img_path=sample["img_path"],
                    pairs=pairs,
                    pixels=pixels,
                    truth=encode_labels(truth),
                    prediction=encode_labels(prediction),
                )
            )


@METRICS.register_module(force=True)
class RecordDetections(RecordMetric):
    """Per image: id, path, size (height, width), boxes [N, 4] x1, y1, x2, y2, scores, labels, masks as COCO's RLE."""

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        from mmdet.structures.mask import encode_mask_results

        for sample in data_samples:
            _require(sample, "pred_instances", "img_id")
            found = sample["pred_instances"]
            scores = found["scores"].cpu().numpy()
            masks = found.get("masks")
            if isinstance(masks, Tensor):
                masks = encode_mask_results(masks.detach().cpu().numpy())
            mask_scores = found["mask_scores"].cpu().numpy() if "mask_scores" in found else scores
            self.results.append(
                dict(
                    img_id=sample["img_id"],
                    img_path=sample["img_path"],
                    size=tuple(sample["ori_shape"][:2]),
                    boxes=found["bboxes"].cpu().numpy(),
                    labels=found["labels"].cpu().numpy(),
                    scores=scores,
                    masks=masks,
                    mask_scores=mask_scores,
                )
            )


def _require(sample: dict, *fields: str) -> None:
    missing = [field for field in fields if field not in sample]
    if missing:
        raise DataError(
            f"a report needs {' and '.join(missing)} of each image, and {sample.get('img_path')} has none: expected a "
            "detector or segmenter whose test pipeline loads annotations, on a split that has some"
        )


def count_pairs(truth: Tensor, prediction: Tensor, classes: int, ignore: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels by truth * classes + prediction: the pairs that occur, and how many pixels have each.

    truth, prediction: [H, W]. Pixels with the truth `ignore`, or a truth that is no class, do not count.
    """
    valid = (truth != ignore) & (truth >= 0) & (truth < classes)
    both = truth[valid].long() * classes + prediction[valid].long()
    pairs, pixels = torch.unique(both, return_counts=True)
    return pairs.cpu().numpy(), pixels.cpu().numpy()


def encode_labels(labels: Tensor) -> bytes:
    """A label map [H, W] as a PNG file of 16 bits; nothing is lost below 65,536."""
    done, data = cv2.imencode(".png", labels.cpu().numpy().astype(np.uint16))
    if not done:
        raise RuntimeError(f"OpenCV could not write a PNG of {tuple(labels.shape)}")
    return data.tobytes()


def decode_labels(data: bytes) -> np.ndarray:
    """The inverse of `encode_labels`, [H, W]."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED).astype(np.int64)
