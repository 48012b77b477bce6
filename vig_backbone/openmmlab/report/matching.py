"""Detections and what they should have found: overlaps, matches as COCO defines them, average precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask

KINDS = ("bbox", "segm")
RECALLS = np.linspace(0, 1, 101)  # where COCO reads precision


@dataclass(frozen=True)
class ImageObjects:
    """One image: its objects, and the detections by falling score.

    Classes count from 0. crowd: regions in which detections do not count.
    shapes: boxes [x, y, width, height] or masks as COCO's RLE, one for each object.
    """

    image: Any  # the image's id
    truth_classes: np.ndarray  # [T]
    truth_crowd: np.ndarray  # [T] bool
    truth_shapes: Sequence[Any]
    classes: np.ndarray  # [D]
    scores: np.ndarray  # [D]
    shapes: Sequence[Any]

    def overlaps(self) -> np.ndarray:
        """IoU of each detection with each object, [D, T]; with a crowd, the share of the detection that is in it."""
        if not len(self.shapes) or not len(self.truth_shapes):
            return np.zeros((len(self.shapes), len(self.truth_shapes)))
        found, truth = list(self.shapes), list(self.truth_shapes)
        if not isinstance(found[0], dict):
            found, truth = np.asarray(found, dtype=float), np.asarray(truth, dtype=float)
        return np.asarray(pycocotools.mask.iou(found, truth, self.truth_crowd.astype(np.uint8).tolist()))


@dataclass(frozen=True)
class Matches:
    """truth: the object that each detection found, -1 for none, [D]; ignored: detections in a crowd, [D] bool."""

    truth: np.ndarray
    ignored: np.ndarray

    @property
    def false_positives(self) -> np.ndarray:
        """Which detections are wrong, [D] bool."""
        return (self.truth < 0) & ~self.ignored


def match(objects: ImageObjects, overlaps: np.ndarray, threshold: float, same_class: bool = True) -> Matches:
    """Each detection, the most certain first, takes the free object that it overlaps most, by `threshold` at least.

    Where it finds none, but a crowd, it is ignored. With same_class=False classes do not matter.
    """
    taken = np.full(len(objects.classes), -1)
    ignored = np.zeros(len(objects.classes), dtype=bool)
    free = ~objects.truth_crowd
    for i, name in enumerate(objects.classes):
        fits = overlaps[i] >= threshold
        if same_class:
            fits &= objects.truth_classes == name
        candidates = np.flatnonzero(fits & free)
        if len(candidates):
            # The last of equals, as COCO's evaluation takes it.
            best = candidates[::-1][np.argmax(overlaps[i, candidates[::-1]])]
            taken[i] = best
            free[best] = False
        else:
            ignored[i] = bool((fits & objects.truth_crowd).any())
    return Matches(taken, ignored)


def average_precision(scores: np.ndarray, hits: np.ndarray, count: int) -> float:
    """COCO's: the mean over 101 recalls of the best precision at that recall or above; NaN without an object.

    scores, hits: [D], of the detections of one class that count; count: objects of that class.
    """
    if count <= 0:
        return float("nan")
    hits = np.asarray(hits, dtype=float)[np.argsort(-np.asarray(scores), kind="mergesort")]
    found = np.cumsum(hits)
    precision = np.maximum.accumulate((found / np.arange(1, len(hits) + 1))[::-1])[::-1]
    places = np.searchsorted(found / count, RECALLS, side="left")
    return float(np.sum(precision[places[places < len(hits)]]) / len(RECALLS))
