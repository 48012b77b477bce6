"""The numbers of reports: those of mmseg, mmdet and COCO, and errors told apart where the right answer is obvious."""

from typing import Any

import numpy as np
import pycocotools.mask
import pytest
import torch
from mmseg.evaluation import IoUMetric

from vig_backbone.openmmlab.report import segmentation
from vig_backbone.openmmlab.report.detection import (
    Evaluation,
    confusion_matrix,
    image_objects,
    image_score,
    kind_scores,
    make_truth,
)
from vig_backbone.openmmlab.report.error_types import break_down
from vig_backbone.openmmlab.report.matching import ImageObjects, average_precision, match
from vig_backbone.openmmlab.report.record import count_pairs

# ---- segmentation


def recorded(truth: torch.Tensor, prediction: torch.Tensor, classes: int) -> dict[str, Any]:
    pairs, pixels = count_pairs(truth, prediction, classes, 255)
    return dict(img_path="a.jpg", pairs=pairs, pixels=pixels)


def test_class_scores_are_those_of_mmseg() -> None:
    truth = torch.randint(0, 6, (2, 40, 50))
    truth[truth == 5] = 255
    prediction = torch.where(torch.rand(2, 40, 50) < 0.6, truth.clamp(max=5), torch.randint(0, 5, (2, 40, 50)))
    prediction[prediction == 5] = 0
    areas = [IoUMetric.intersect_and_union(p, t, 7, 255) for p, t in zip(prediction, truth)]
    areas = [sum(each) for each in zip(*areas)]
    expected = IoUMetric.total_area_to_metrics(*areas, metrics=["mIoU", "mFscore"])
    found = segmentation.class_scores(
        segmentation.confusion_matrix([recorded(t, p, 7) for t, p in zip(truth, prediction)], 7)
    )
    names = dict(IoU="iou", Acc="accuracy", Recall="accuracy", Precision="precision", Fscore="fscore")
    for name, field in names.items():
        np.testing.assert_allclose(getattr(found, field), 100 * expected[name], rtol=1e-5)
    assert np.isnan(found.iou[5:]).all()  # classes that do not occur


def test_confusion_has_the_truth_in_rows_and_leaves_out_what_is_ignored() -> None:
    truth, prediction = torch.tensor([[0, 0, 1, 255]]), torch.tensor([[0, 1, 1, 2]])
    confusion = segmentation.confusion_matrix([recorded(truth, prediction, 3)], 3)
    assert confusion.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(segmentation.row_shares(confusion)[0], [0.5, 0.5, 0])


def test_confused_pairs_are_those_off_the_diagonal_most_frequent_first() -> None:
    confusion = np.array([[9, 2, 0], [5, 1, 0], [0, 0, 7]])
    found = [(p.truth, p.prediction, p.count) for p in segmentation.confused_pairs(confusion, 10)]
    assert found == [(1, 0, 5), (0, 1, 2)]
    assert segmentation.confused_pairs(confusion, 1)[0].share == pytest.approx(5 / 6)


def test_score_of_an_image_is_the_mean_iou_of_what_is_in_it() -> None:
    # Class 0: 2 of 3 pixels; class 1: 1 of 2; class 2 occurs nowhere.
    truth, prediction = torch.tensor([[0, 0, 0, 1]]), torch.tensor([[0, 0, 1, 1]])
    good, bad = recorded(truth, prediction, 3), recorded(truth, 2 - truth, 3)
    nothing = recorded(torch.full((1, 4), 255), prediction, 3)
    scored = segmentation.scored_images([good, nothing, bad], 3)
    assert [image is expected for (_, image), expected in zip(scored, (bad, good))] == [True, True]
    assert scored[1][0] == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)


# ---- detection: errors

OBJECT, NEAR, FAR = [0, 0, 10, 10], [0, 0, 10, 30], [50, 50, 10, 10]  # NEAR: IoU 1/3 with OBJECT


def one_image(truth: list, found: list, crowd: tuple[int, ...] = ()) -> ImageObjects:
    """truth: (class, box) each; found: (class, score, box) each, the most certain first."""
    return ImageObjects(
        image=1,
        truth_classes=np.array([name for name, _ in truth], dtype=int),
        truth_crowd=np.array([i in crowd for i in range(len(truth))], dtype=bool),
        truth_shapes=[box for _, box in truth],
        classes=np.array([name for name, *_ in found], dtype=int),
        scores=np.array([score for _, score, _ in found]),
        shapes=[box for *_, box in found],
    )


RIGHT = (0, 0.5, OBJECT)
CASES = {
    "nothing is wrong": ([(0, OBJECT)], [RIGHT], {}, {}),
    "another class": ([(0, OBJECT)], [(1, 0.9, OBJECT)], {"classification": 1}, {"classification": 100}),
    "wrong place": ([(0, OBJECT)], [(0, 0.9, NEAR)], {"localization": 1}, {"localization": 100}),
    # What goes would have stood before the right one: precision 1/2 -> 1.
    "both": ([(0, OBJECT), (1, FAR)], [(1, 0.9, NEAR), RIGHT, (1, 0.4, FAR)], {"both": 1}, {"both": 25}),
    "twice": ([(0, OBJECT), (0, FAR)], [(0, 0.9, OBJECT), (0, 0.8, OBJECT), (0, 0.7, FAR)], {"duplicate": 1}, {}),
    "nothing there": ([(0, OBJECT)], [(0, 0.9, FAR), RIGHT], {"background": 1}, {"background": 50}),
    "not found": ([(0, OBJECT), (0, FAR)], [RIGHT], {"missed": 1}, {}),
    "empty image": ([], [(0, 0.9, OBJECT)], {"background": 1}, {}),
    "no detection": ([(0, OBJECT), (1, FAR)], [], {"missed": 2}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_error_is_of_its_type_and_no_other(case: str) -> None:
    truth, found, counts, gains = CASES[case]
    errors = break_down([one_image(truth, found)])
    assert {name: count for name, count in errors.counts.items() if count} == counts
    for name, gain in errors.gains.items():
        if name in gains:
            assert errors.gains[name] == pytest.approx(gains[name])
        elif name not in counts:
            assert gain == 0


def test_mending_false_positives_or_missed_objects_leaves_the_other_errors() -> None:
    truth, found = [(0, OBJECT), (0, FAR)], [(0, 0.9, [20, 20, 5, 5]), RIGHT]
    errors = break_down([one_image(truth, found)])
    assert errors.ap50 == pytest.approx(100 * 0.5 * 51 / 101)  # precision 1/2 up to recall 1/2
    assert errors.false_positives == pytest.approx(100 * 51 / 101 - errors.ap50)
    assert errors.false_negatives == errors.gains["missed"] == pytest.approx(50 - errors.ap50)


def test_mended_detections_of_one_object_count_once() -> None:
    found = [(1, 0.9, OBJECT), (1, 0.8, OBJECT)]
    errors = break_down([one_image([(0, OBJECT)], found)])
    assert errors.counts["classification"] == 2
    assert errors.gains["classification"] == pytest.approx(100)
    # The object has a right detection: the mended one goes, and the right one is the first.
    errors = break_down([one_image([(0, OBJECT)], [(0, 0.9, NEAR), RIGHT])])
    assert errors.ap50 == pytest.approx(50)
    assert errors.gains["localization"] == pytest.approx(50)


def test_object_that_another_error_explains_is_not_missed() -> None:
    errors = break_down([one_image([(0, OBJECT), (0, FAR)], [(0, 0.9, FAR), (0, 0.5, NEAR)])])
    assert errors.counts["missed"] == 0
    assert errors.gains["missed"] == 0
    assert errors.false_negatives > 0


def test_detection_in_a_crowd_is_no_error() -> None:
    truth, inside = [(0, OBJECT), (0, [40, 40, 40, 40])], (0, 0.9, [50, 50, 10, 10])
    assert break_down([one_image(truth, [inside, RIGHT], crowd=(1,))]).ap50 == pytest.approx(100)
    assert break_down([one_image(truth, [inside, RIGHT])]).ap50 < 100


# ---- detection: numbers


def random_evaluation(seed: int) -> Evaluation:
    """20 images, 4 classes (one never occurs), crowds, boxes of all sizes, masks that are the boxes."""
    random = np.random.default_rng(seed)
    infos, images = [], []
    for i in range(20):
        boxes = np.c_[random.uniform(0, 100, (6, 2)), random.uniform(5, 120, (6, 2))][: random.integers(0, 7)]
        boxes[:, 2:] += boxes[:, :2]
        labels = random.integers(0, 3, len(boxes))
        instances = [
            dict(bbox=box.tolist(), bbox_label=int(label), ignore_flag=int(random.random() < 0.1), mask=rle(box))
            for box, label in zip(boxes, labels)
        ]
        infos.append(dict(img_id=i, img_path=f"{i}.jpg", width=240, height=240, instances=instances))
        found = np.concatenate([boxes, boxes, random.uniform(0, 240, (2, 4))])
        found += random.normal(0, 5, found.shape)
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 2)
        classes = np.concatenate([labels, random.integers(0, 4, len(labels) + 2)])
        scores = np.round(random.random(len(found)), 1).astype(np.float32)  # with equal ones
        masks = [rle(box) for box in found]
        images.append(
            dict(img_id=i, img_path=f"{i}.jpg", size=(240, 240), boxes=found, labels=classes, scores=scores)
            | dict(masks=masks, mask_scores=scores)
        )
    truth, categories = make_truth(infos, ["a", "b", "c", "never"])
    return Evaluation(truth, categories, images)


def rle(box: np.ndarray) -> dict:
    x1, y1, x2, y2 = np.clip(box, 0, 240)
    polygon = [float(v) for v in (x1, y1, x2, y1, x2, y2, x1, y2)]
    return pycocotools.mask.merge(pycocotools.mask.frPyObjects([polygon], 240, 240))


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_matches_and_average_precision_are_those_of_coco(kind: str, seed: int) -> None:
    evaluation = random_evaluation(seed)
    assert evaluation.kinds == ("bbox", "segm")
    scores = kind_scores(evaluation, kind)
    assert 5 < scores.summary["mAP_50"] < 95
    objects = image_objects(evaluation, kind)
    assert break_down(objects).ap50 == pytest.approx(scores.summary["mAP_50"], abs=1e-6)
    for label, name in enumerate(evaluation.names):
        assert class_precision(objects, label, 0.75) == pytest.approx(scores.classes[name][2], abs=1e-6, nan_ok=True)
    assert np.isnan(scores.classes["never"]).all()
    mean = np.nanmean([each[0] for each in scores.classes.values()])
    assert scores.summary["mAP"] == pytest.approx(mean, abs=1e-6)


def class_precision(images: list[ImageObjects], label: int, threshold: float) -> float:
    scores, hits, count = [], [], 0
    for objects in images:
        matches = match(objects, objects.overlaps(), threshold)
        mine = (objects.classes == label) & ~matches.ignored
        scores += objects.scores[mine].tolist()
        hits += (matches.truth[mine] >= 0).tolist()
        count += int(((objects.truth_classes == label) & ~objects.truth_crowd).sum())
    return 100 * average_precision(np.array(scores), np.array(hits), count)


def test_curve_of_precision_ends_where_nothing_more_is_found() -> None:
    scores = kind_scores(random_evaluation(0), "bbox")
    curve = scores.precision[0.5]
    assert (np.diff(curve) <= 1e-9).all()
    assert set(scores.class_precision) == {"a", "b", "c", "never"}


def test_confusion_of_detections_has_the_background_last() -> None:
    truth = [(0, OBJECT), (1, [100, 0, 10, 10]), (1, [200, 0, 10, 10])]
    found = [(1, 0.9, OBJECT), (1, 0.8, [200, 0, 10, 10]), (0, 0.7, FAR), (0, 0.1, [100, 0, 10, 10])]
    confusion = confusion_matrix([one_image(truth, found)], classes=2)
    # The last detection is not certain enough: its object is without one.
    assert confusion.tolist() == [[0, 1, 0], [0, 1, 1], [1, 0, 0]]


def test_score_of_an_image_is_its_panoptic_quality() -> None:
    assert image_score(one_image([(0, OBJECT)], [RIGHT])) == pytest.approx(100)
    # One right of IoU 1/2 (two objects, two detections).
    half = one_image([(0, OBJECT), (0, FAR)], [(0, 0.9, [0, 0, 10, 20]), (1, 0.8, FAR)])
    assert image_score(half) == pytest.approx(100 * 0.5 / 2)
    assert np.isnan(image_score(one_image([], [(0, 0.1, OBJECT)])))


def test_nothing_detected_is_no_crash() -> None:
    evaluation = random_evaluation(0)
    for image in evaluation.images:
        image.update(boxes=np.zeros((0, 4)), labels=np.zeros(0, dtype=int), scores=np.zeros(0), masks=[])
        image["mask_scores"] = image["scores"]
    assert kind_scores(evaluation, "bbox") is None
    errors = break_down(image_objects(evaluation, "bbox"))
    assert errors.ap50 == 0
    assert errors.counts["missed"] == sum(evaluation.object_counts())
