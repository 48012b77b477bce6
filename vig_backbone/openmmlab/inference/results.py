"""What models predict for an image, as NumPy arrays: no class of mmdet or mmseg is needed to use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Size = tuple[int, int]  # height, width


@dataclass(frozen=True, eq=False)
class Detections:
    """Objects of an image, the most certain first.

    boxes: [N, 4] float32, x1, y1, x2, y2 in pixels of the image; scores: [N] float32; labels: [N] int64, indices into
    classes; rles: N masks in COCO's run lengths, None if the model predicts none; size: of the image.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    rles: list[dict] | None
    size: Size
    classes: Sequence[str]

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        return [self.classes[label] for label in self.labels]

    @property
    def masks(self) -> np.ndarray | None:
        """[N, H, W] bool"""
        if self.rles is None:
            return None
        from pycocotools import mask

        return mask.decode(self.rles).transpose(2, 0, 1).astype(bool) if self.rles else np.zeros((0, *self.size), bool)

    def above(self, threshold: float) -> Detections:
        """Those with at least this score."""
        kept = np.flatnonzero(self.scores >= threshold)
        rles = None if self.rles is None else [self.rles[i] for i in kept]
        return replace(self, boxes=self.boxes[kept], scores=self.scores[kept], labels=self.labels[kept], rles=rles)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        instances = [
            {"label": int(label), "class": name, "score": round(float(score), 5), "box": _rounded(box)}
            for label, name, score, box in zip(self.labels, self.names, self.scores, self.boxes)
        ]
        for instance, rle in zip(instances, self.rles or ()):
            instance["mask"] = {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
        return {"size": list(self.size), "instances": instances}


@dataclass(frozen=True, eq=False)
class LabelMap:
    """The class of each pixel of an image.

    labels: [H, W] uint8 (uint16 for more than 256 classes), indices into classes.
    """

    labels: np.ndarray
    classes: Sequence[str]

    @property
    def size(self) -> Size:
        return self.labels.shape

    def shares(self) -> dict[int, float]:
        """Label -> share of the image's pixels, of the classes that are there, the largest first."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.classes))
        order = np.argsort(-counts, kind="stable")
        return {int(label): float(counts[label] / self.labels.size) for label in order if counts[label]}

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the shares of the classes; the map itself is for a PNG."""
        classes = [
            {"label": label, "class": self.classes[label], "share": round(share, 5)}
            for label, share in self.shares().items()
        ]
        return {"size": list(self.size), "classes": classes}


Result = Detections | LabelMap


def _rounded(box: np.ndarray) -> list[float]:
    return [round(float(value), 2) for value in box]
