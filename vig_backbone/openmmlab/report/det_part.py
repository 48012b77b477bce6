"""The part of a report that is about a detector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mmcv
import numpy as np
import pycocotools.mask

from .charts import heat_map, line_chart
from .detection import (
    CERTAIN,
    Evaluation,
    KindScores,
    confusion_matrix,
    image_objects,
    image_score,
    kind_scores,
)
from .error_types import Breakdown, break_down
from .matching import RECALLS, ImageObjects
from .page import matrix, paragraph, picture, row, section, table
from .part import Part, Scored, best_and_worst, gallery
from .pictures import View, data_url, draw, palette_of, side_by_side
from .segmentation import confused_pairs, row_shares

TITLES = {"bbox": "boxes", "segm": "masks"}
LEGIBLE_CLASSES = 20
PAIRS = 25
LINES = 12  # as many classes have a curve of their own
SIDE = 360  # pixels of a picture

WHAT_ERRORS_ARE = (
    "As TIDE defines them (Bolya et al. 2020): what AP50 would gain, in points, if all errors of one type were "
    "mended. Classification: right place, wrong class. Localization: right class, IoU from 0.1 to 0.5. Both: neither. "
    "Duplicate: the object has a detection already. Background: nothing is there. Missed: an object without a right "
    "detection, and without one to mend. The gains do not add up."
)


def detection_part(evaluation: Evaluation, palette: Any, count: int) -> Part:
    """count: how many of the worst and of the best images are shown."""
    html, found = [], {}
    for kind in evaluation.kinds:
        scores, objects = kind_scores(evaluation, kind), image_objects(evaluation, kind)
        errors = break_down(objects)
        html += _kind_sections(evaluation, kind, scores, errors)
        found[kind] = _kind_json(scores, errors)
    boxes = image_objects(evaluation, "bbox")
    confusion = confusion_matrix(boxes, len(evaluation.names))
    images = scored_images(evaluation, objects)  # by masks where there are some

    def show(image: dict[str, Any]) -> str:
        return _picture(evaluation, image, palette_of(evaluation.names, palette))

    html.append(section("Confusion", *_confusion(evaluation.names, confusion)))
    what = TITLES[evaluation.kinds[-1]]
    text = (
        f"Truth and prediction. The score of an image is the panoptic quality of its {what}, in percent: the sum of "
        f"the IoUs of right detections (IoU of 0.5 or more) over the mean number of objects and detections. Detections "
        f"of a score below {CERTAIN} are left out."
    )
    html.append(
        section("Images", paragraph(text, soft=True), *gallery(best_and_worst(images, count), show)),
    )
    found["confusion"] = confusion.tolist()
    found["images"] = {image["img_path"]: score for score, image in images}
    return Part(html, found)


def scored_images(evaluation: Evaluation, objects: Sequence[ImageObjects]) -> list[Scored]:
    """Images that were evaluated, the worst first; those without an object and a detection are left out."""
    recorded = {image["img_id"]: image for image in evaluation.images}
    scored = [(image_score(each), recorded[each.image]) for each in objects if each.image in recorded]
    return sorted((each for each in scored if not np.isnan(each[0])), key=lambda each: each[0])


def _kind_sections(evaluation: Evaluation, kind: str, scores: KindScores | None, errors: Breakdown) -> list[str]:
    title = TITLES[kind].capitalize()
    if scores is None:
        return [section(title, paragraph("Nothing was detected."))]
    heads = ("class", "objects", "AP", "AP50", "AP75", "small", "medium", "large")
    counts = evaluation.object_counts()
    everything = ["all", sum(counts), *scores.summary.values()]
    rows = [[name, number, *scores.classes[name]] for name, number in zip(evaluation.names, counts)]
    by_iou = {f"IoU {iou:.2f}": list(zip(RECALLS, values)) for iou, values in scores.precision.items()}
    by_class = {name: list(zip(RECALLS, values)) for name, values in scores.class_precision.items()}
    own = by_class if len(by_class) <= LINES else {}
    return [
        section(
            f"{title}: average precision",
            table(heads, rows, last=everything),
            row(
                line_chart(by_iou, "recall", "precision, mean over the classes", y_range=(0, 1)),
                line_chart(own, "recall", "precision of the classes, IoU 0.5", y_range=(0, 1)),
            ),
        ),
        section(f"{title}: errors", paragraph(WHAT_ERRORS_ARE, soft=True), _error_table(errors)),
    ]


def _error_table(errors: Breakdown) -> str:
    rows = [[name, errors.counts[name], errors.gains[name]] for name in errors.counts]
    rows += [
        ["all false positives", None, errors.false_positives],
        ["all objects not found", None, errors.false_negatives],
    ]
    return table(("error", "number", f"points of AP50, now {errors.ap50:.2f}"), rows, sorts=False)


def _confusion(names: list[str], confusion: np.ndarray) -> list[str]:
    names, shares = [*names, "background"], row_shares(confusion)
    text = (
        f"Boxes of a score from {CERTAIN}, the most certain first, with the free object of any class that they overlap "
        "most, IoU of 0.5 or more. Rows are the truth, columns the detection; percent of the row. Background: objects "
        "without a detection (last column), detections without an object (last row)."
    )
    if len(names) <= LEGIBLE_CLASSES:
        shown = matrix(shares, names)
    else:
        shown = picture(data_url(heat_map(shares, cell=5), lossless=True), "confusion matrix", pixels=True)
    background = len(names) - 1
    pairs = [p for p in confused_pairs(confusion, confusion.size) if background not in (p.truth, p.prediction)][:PAIRS]
    rows = [[names[p.truth], names[p.prediction], p.count, 100 * p.share] for p in pairs]
    most = table(("truth", "called", "objects", "% of the class"), rows) if rows else ""
    return [paragraph(text, soft=True), shown, "<h3>Most confused</h3>" if rows else "", most]


def _picture(evaluation: Evaluation, image: dict[str, Any], colours: list) -> str:
    pixels = mmcv.imread(image["img_path"], channel_order="rgb")
    labels = {category: label for label, category in enumerate(evaluation.categories)}
    annotations = [a for a in evaluation.truth.imgToAnns[image["img_id"]] if a["category_id"] in labels]
    boxes = np.array([a["bbox"] for a in annotations], dtype=float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    has_masks = "segm" in evaluation.kinds
    truth = View(
        pixels,
        boxes=boxes,
        labels=np.array([labels[a["category_id"]] for a in annotations], dtype=int),
        masks=_bitmaps([evaluation.truth.annToRLE(a) for a in annotations]) if has_masks else None,
    )
    order = np.argsort(-image["scores"], kind="mergesort")
    order = order[image["scores"][order] >= CERTAIN]
    found = View(
        pixels,
        boxes=image["boxes"][order],
        labels=image["labels"][order],
        scores=image["scores"][order],
        masks=_bitmaps([image["masks"][i] for i in order]) if has_masks else None,
    )
    return data_url(side_by_side([draw(view, evaluation.names, colours, SIDE) for view in (truth, found)]))


def _bitmaps(masks: list[dict]) -> np.ndarray | None:
    """COCO's run lengths -> [N, H, W] bool."""
    return np.stack([pycocotools.mask.decode(mask) for mask in masks]).astype(bool) if masks else None


def _kind_json(scores: KindScores | None, errors: Breakdown) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "errors": {
            "AP50": errors.ap50,
            "counts": errors.counts,
            "gains": errors.gains,
            "false_positives": errors.false_positives,
            "false_negatives": errors.false_negatives,
        }
    }
    if scores is not None:
        columns = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
        numbers["summary"] = scores.summary
        numbers["classes"] = {name: dict(zip(columns, values)) for name, values in scores.classes.items()}
        numbers["precision"] = {f"{iou:.2f}": values.tolist() for iou, values in scores.precision.items()}
    return numbers
