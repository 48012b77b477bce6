"""What a confusion matrix says about a segmenter: scores of the classes, confused pairs, scores of images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ClassScores:
    """Percent, [classes] each; NaN where there is nothing to divide by. Pixels of the truth and of the prediction.

    accuracy: the share of the class's pixels that got its name, which is recall; mmseg prints both.
    """

    iou: np.ndarray
    accuracy: np.ndarray
    precision: np.ndarray
    fscore: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray


@dataclass(frozen=True)
class ConfusedPair:
    """How many pixels (or objects) of the class `truth` were called `prediction`; share: of all of that class."""

    truth: int
    prediction: int
    count: int
    share: float


def confusion_matrix(images: Iterable[dict[str, Any]], classes: int) -> np.ndarray:
    """Pixels by truth (rows) and prediction (columns), [classes, classes] int64, of recorded images."""
    total = np.zeros(classes * classes, dtype=np.int64)
    for image in images:
        total[image["pairs"]] += image["pixels"]
    return total.reshape(classes, classes)


def class_scores(confusion: np.ndarray) -> ClassScores:
    """As mmseg's IoUMetric defines them."""
    hits, truth, predicted = np.diag(confusion).astype(float), confusion.sum(1), confusion.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = hits / predicted, hits / truth
        return ClassScores(
            iou=100 * hits / (truth + predicted - hits),
            accuracy=100 * recall,
            precision=100 * precision,
            fscore=100 * 2 * precision * recall / (precision + recall),
            truth=truth,
            predicted=predicted,
        )


def image_score(confusion: np.ndarray) -> float:
    """Mean IoU in percent of the classes that an image has or was said to have; NaN without a valid pixel."""
    iou = class_scores(confusion).iou
    return float(np.mean(iou[~np.isnan(iou)])) if confusion.any() else float("nan")


def scored_images(images: list[dict[str, Any]], classes: int) -> list[tuple[float, dict[str, Any]]]:
    """Images with their scores, the worst first; those without a valid pixel are left out."""
    scored = [(image_score(confusion_matrix([image], classes)), image) for image in images]
    return sorted((each for each in scored if not np.isnan(each[0])), key=lambda each: each[0])


def confused_pairs(confusion: np.ndarray, count: int) -> list[ConfusedPair]:
    """The `count` pairs of different classes that were most often confused, the most frequent first."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    rows, columns = np.unravel_index(order, wrong.shape)
    totals = confusion.sum(1)
    return [
        ConfusedPair(int(row), int(column), int(wrong[row, column]), float(wrong[row, column] / totals[row]))
        for row, column in zip(rows, columns)
        if wrong[row, column]
    ]


def row_shares(confusion: np.ndarray) -> np.ndarray:
    """Each row divided by its sum; rows without anything are 0."""
    return confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
