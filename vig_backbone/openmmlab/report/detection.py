"""What the recorded detections say about a detector: COCO's tables and curves, confusion, scores of images."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mmdet.datasets.api_wrappers import COCO, COCOeval

from .matching import KINDS, RECALLS, ImageObjects, match

MAX_DETECTIONS = (100, 300, 1000)  # as mmdet's CocoMetric
SIZES = ("small", "medium", "large")  # below 32² pixels, below 96², and above
CERTAIN = 0.3  # score of the detections that a reader would look at
OVERLAP = 0.5


@dataclass(frozen=True)
class KindScores:
    """Of boxes ('bbox') or masks ('segm'), in percent; NaN where there is no object.

    summary: by the names of CocoMetric, mAP to mAP_l; classes: [AP, AP50, AP75, small, medium, large] by name;
    precision: at the 101 recalls, mean over the classes, by IoU; class_precision: at IoU 0.5, by class.
    """

    summary: dict[str, float]
    classes: dict[str, list[float]]
    precision: dict[float, np.ndarray]
    class_precision: dict[str, np.ndarray]


@dataclass(frozen=True)
class Evaluation:
    """The ground truth as COCO has it, and recorded images.

    categories: ids of the classes in the order of the model's labels.
    """

    truth: COCO
    categories: list[int]
    images: list[dict[str, Any]]

    @property
    def names(self) -> list[str]:
        return [self.truth.loadCats(category)[0]["name"] for category in self.categories]

    @property
    def kinds(self) -> tuple[str, ...]:
        """'segm' as well if the model predicts masks, and the objects have some."""
        predicted = any(image["masks"] is not None for image in self.images)
        given = all(annotation.get("segmentation") for annotation in self.truth.anns.values())
        return KINDS if predicted and given else KINDS[:1]

    def object_counts(self) -> list[int]:
        """Objects of each class, crowds not counted."""
        counts = dict.fromkeys(self.categories, 0)
        for annotation in self.truth.anns.values():
            if annotation["category_id"] in counts and not annotation.get("iscrowd"):
                counts[annotation["category_id"]] += 1
        return list(counts.values())


def read_truth(file: str, classes: Sequence[str]) -> tuple[COCO, list[int]]:
    """The annotation file of a CocoMetric, and the ids of the classes."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(file)
    return truth, truth.get_cat_ids(cat_names=list(classes))


def make_truth(infos: Sequence[dict[str, Any]], classes: Sequence[str]) -> tuple[COCO, list[int]]:
    """The same from the samples of a data set of another format (mmdet's `get_data_info`)."""
    images, annotations = [], []
    for info in infos:
        images.append(dict(id=info["img_id"], width=info["width"], height=info["height"], file_name=info["img_path"]))
        for each in info["instances"]:
            x1, y1, x2, y2 = map(float, each["bbox"])
            annotation = dict(
                id=len(annotations) + 1,  # COCO's tool takes 0 for none
                image_id=info["img_id"],
                category_id=int(each["bbox_label"]),
                bbox=[x1, y1, x2 - x1, y2 - y1],
                area=(x2 - x1) * (y2 - y1),
                iscrowd=int(each.get("ignore_flag", 0)),
            )
            if each.get("mask"):
                annotation["segmentation"] = each["mask"]
            annotations.append(annotation)
    truth = COCO()
    categories = [dict(id=i, name=name) for i, name in enumerate(classes)]
    truth.dataset = dict(info={}, images=images, annotations=annotations, categories=categories)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth, list(range(len(classes)))


def coco_detections(evaluation: Evaluation, kind: str) -> list[dict[str, Any]]:
    """What the model found, as CocoMetric hands it to COCO's tool."""
    found = []
    for image in evaluation.images:
        scores = image["scores"] if kind == "bbox" else image["mask_scores"]
        for i, label in enumerate(image["labels"].tolist()):
            x1, y1, x2, y2 = image["boxes"][i].tolist()
            entry = dict(image_id=image["img_id"], category_id=evaluation.categories[label], score=float(scores[i]))
            # Without the box, COCO's tool takes the area of the mask.
            shape = dict(bbox=[x1, y1, x2 - x1, y2 - y1]) if kind == "bbox" else dict(segmentation=image["masks"][i])
            found.append(entry | shape)
    return found


def kind_scores(evaluation: Evaluation, kind: str) -> KindScores | None:
    """COCO's scores of boxes or masks; None if nothing at all was detected."""
    detections = coco_detections(evaluation, kind)
    if not detections:
        return None
    with contextlib.redirect_stdout(io.StringIO()):
        tool = COCOeval(evaluation.truth, evaluation.truth.loadRes(detections), kind)
        tool.params.catIds = evaluation.categories
        tool.params.imgIds = evaluation.truth.get_img_ids()
        tool.params.maxDets = list(MAX_DETECTIONS)
        tool.evaluate()
        tool.accumulate()
        tool.summarize()
    names = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")
    # [IoU, recall, class, size (all, small, medium, large), most detections], -1 where there is no object
    precision = np.where(tool.eval["precision"] < 0, np.nan, tool.eval["precision"])[..., -1]
    classes = {}
    for i, name in enumerate(evaluation.names):
        at = precision[:, :, i]
        parts = [at[..., 0], at[0, :, 0], at[5, :, 0], *(at[..., 1 + size] for size in range(len(SIZES)))]
        classes[name] = [100 * mean(part) for part in parts]
    return KindScores(
        summary={name: percent(value) for name, value in zip(names, tool.stats)},
        classes=classes,
        precision={
            round(float(iou), 2): means(precision[i, :, :, 0])
            for i, iou in enumerate(tool.params.iouThrs)
            if i in (0, 5, 8)
        },
        class_precision={name: precision[0, :, i, 0] for i, name in enumerate(evaluation.names)},
    )


def percent(value: float) -> float:
    """COCO's -1 stands for no object."""
    return float("nan") if value < 0 else 100 * float(value)


def mean(values: np.ndarray) -> float:
    """Of what is not NaN; NaN without anything."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def means(values: np.ndarray) -> np.ndarray:
    """[R, K] -> [R]: of the classes that have objects."""
    there = ~np.isnan(values).all(0)
    return values[:, there].mean(1) if there.any() else np.full(len(RECALLS), np.nan)


def image_objects(evaluation: Evaluation, kind: str) -> list[ImageObjects]:
    """All images of the ground truth in the order of their ids, as COCO's tool has it."""
    labels = {category: label for label, category in enumerate(evaluation.categories)}
    recorded = {image["img_id"]: image for image in evaluation.images}
    objects = []
    for image_id in sorted(evaluation.truth.get_img_ids()):
        annotations = [a for a in evaluation.truth.imgToAnns[image_id] if a["category_id"] in labels]
        image = recorded.get(image_id)
        shapes, scores, classes = _found(image, kind) if image else ([], np.zeros(0), np.zeros(0, dtype=int))
        order = np.argsort(-scores, kind="mergesort")
        objects.append(
            ImageObjects(
                image_id,
                np.array([labels[a["category_id"]] for a in annotations], dtype=int),
                np.array([bool(a.get("iscrowd")) for a in annotations], dtype=bool),
                [a["bbox"] if kind == "bbox" else evaluation.truth.annToRLE(a) for a in annotations],
                classes[order],
                scores[order],
                [shapes[i] for i in order],
            )
        )
    return objects


def _found(image: dict[str, Any], kind: str) -> tuple[list, np.ndarray, np.ndarray]:
    if kind == "segm":
        return list(image["masks"]), image["mask_scores"], image["labels"]
    boxes = image["boxes"].copy().reshape(-1, 4)
    boxes[:, 2:] -= boxes[:, :2]
    return boxes.tolist(), image["scores"], image["labels"]


def certain(objects: ImageObjects) -> ImageObjects:
    """Without detections of a score below CERTAIN."""
    count = int((objects.scores >= CERTAIN).sum())
    return ImageObjects(
        objects.image,
        objects.truth_classes,
        objects.truth_crowd,
        objects.truth_shapes,
        objects.classes[:count],
        objects.scores[:count],
        objects.shapes[:count],
    )


def confusion_matrix(images: Sequence[ImageObjects], classes: int) -> np.ndarray:
    """Objects by class (rows) and by that of the detection (columns), [classes + 1, classes + 1].

    The last row and column are the background: detections without an object, objects without a detection. Detections
    of a score from CERTAIN, the most certain first, take the free object of any class with an IoU of OVERLAP or more.
    """
    confusion = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    for objects in map(certain, images):
        matches = match(objects, objects.overlaps(), OVERLAP, same_class=False)
        for name, truth in zip(objects.classes, matches.truth):
            if truth >= 0:
                confusion[objects.truth_classes[truth], name] += 1
        np.add.at(confusion, (classes, objects.classes[matches.false_positives]), 1)
        missed = ~objects.truth_crowd
        missed[matches.truth[matches.truth >= 0]] = False
        np.add.at(confusion, (objects.truth_classes[missed], classes), 1)
    return confusion


def image_score(objects: ImageObjects) -> float:
    """Panoptic quality of the detections of a score from CERTAIN, percent; NaN without objects and detections.

    The sum of the IoUs of the right ones over the mean number of objects and detections: 100 if all is found, exactly
    and once (Kirillov et al. 2019, arXiv 1801.00868).
    """
    objects = certain(objects)
    overlaps = objects.overlaps()
    matches = match(objects, overlaps, OVERLAP)
    right = np.flatnonzero(matches.truth >= 0)
    count = ((~objects.truth_crowd).sum() + (~matches.ignored).sum()) / 2
    return 100 * float(overlaps[right, matches.truth[right]].sum() / count) if count else float("nan")
