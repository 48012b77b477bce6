"""The part of a report that is about a segmenter."""

from __future__ import annotations

from typing import Any

import mmcv
import numpy as np

from .charts import heat_map
from .page import matrix, paragraph, picture, section, table
from .part import Part, best_and_worst, gallery
from .pictures import View, data_url, draw, palette_of, side_by_side
from .record import decode_labels
from .segmentation import ClassScores, class_scores, confused_pairs, confusion_matrix, row_shares, scored_images

LEGIBLE_CLASSES = 20  # more do not fit into a table of numbers
PAIRS = 25
SIDE = 360  # pixels of a picture


def segmentation_part(records: dict[str, Any], count: int) -> Part:
    """count: how many of the worst and of the best images are shown."""
    names = records["classes"]
    confusion = confusion_matrix(records["images"], len(names))
    scores = class_scores(confusion)
    images = scored_images(records["images"], len(names))
    colours = palette_of(names, records["palette"])

    def show(image: dict[str, Any]) -> str:
        return _picture(image, names, colours)

    html = [
        section("Classes", _class_table(names, scores)),
        section("Confusion", *_confusion(names, confusion)),
        section(
            "Images",
            paragraph(
                "Truth and prediction. The score of an image is its own mIoU, in percent: the mean over the classes "
                "that it has or was said to have.",
                soft=True,
            ),
            *gallery(best_and_worst(images, count), show),
        ),
    ]
    return Part(html, _json(names, confusion, scores, images))


def _class_table(names: list[str], scores: ClassScores) -> str:
    heads = ("class", "IoU", "accuracy = recall", "precision", "F-score", "pixels", "predicted", "share %")
    total = max(1, scores.truth.sum())
    columns = (scores.iou, scores.accuracy, scores.precision, scores.fscore)
    return table(
        heads,
        (
            [name, *(float(c[i]) for c in columns), int(scores.truth[i]), int(scores.predicted[i])]
            + [float(100 * scores.truth[i] / total)]
            for i, name in enumerate(names)
        ),
    )


def _confusion(names: list[str], confusion: np.ndarray) -> list[str]:
    shares = row_shares(confusion)
    text = "Rows are the truth, columns the prediction; percent of the pixels of the row."
    if len(names) <= LEGIBLE_CLASSES:
        shown = matrix(shares, names)
    else:
        text = f"Rows are the truth, columns the prediction, {len(names)} classes in their order; dark: a large share."
        shown = picture(data_url(heat_map(shares, cell=4), lossless=True), "confusion matrix", pixels=True)
    pairs = confused_pairs(confusion, PAIRS)
    rows = ([names[p.truth], names[p.prediction], p.count, 100 * p.share] for p in pairs)
    most = table(("truth", "called", "pixels", "% of the class"), rows) if pairs else ""
    return [paragraph(text, soft=True), shown, "<h3>Most confused</h3>" if pairs else "", most]


def _picture(image: dict[str, Any], names: list[str], colours: list) -> str:
    pixels = mmcv.imread(image["img_path"], channel_order="rgb")
    maps = [decode_labels(image[name]) for name in ("truth", "prediction")]
    views = [View(_as_large_as(pixels, each), label_map=each) for each in maps]
    return data_url(side_by_side([draw(view, names, colours, SIDE) for view in views]))


def _as_large_as(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A pipeline may have given labels of another size."""
    H, W = labels.shape
    return image if image.shape[:2] == (H, W) else mmcv.imresize(image, (W, H))


def _json(names: list[str], confusion: np.ndarray, scores: ClassScores, images: list) -> dict[str, Any]:
    fields = dict(
        iou=scores.iou,
        accuracy=scores.accuracy,
        recall=scores.accuracy,
        precision=scores.precision,
        fscore=scores.fscore,
    )
    return {
        "classes": {
            name: {field: float(values[i]) for field, values in fields.items()}
            | {"pixels": int(scores.truth[i]), "predicted_pixels": int(scores.predicted[i])}
            for i, name in enumerate(names)
        },
        "confusion": confusion.tolist(),
        "confused": [
            dict(truth=names[p.truth], prediction=names[p.prediction], pixels=p.count, share=p.share)
            for p in confused_pairs(confusion, PAIRS)
        ],
        "images": {image["img_path"]: score for score, image in images},
    }
