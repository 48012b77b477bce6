"""Why a detector loses average precision, as TIDE defines it (Bolya et al. 2020, arXiv 2008.08115).

Every false positive is one of five errors, every object that nothing else would bring back is missed. What an error
costs is what AP50 would gain if all errors of its type were mended:

    classification  an object of another class is there (IoU 0.5 or more): it gets that class
    localization    an object of its class is near (0.1 to 0.5): it gets its place
    both            near, and of another class: goes
    duplicate       its object has a detection already: goes
    background      nothing is there (below 0.1): goes
    missed          an object without a detection, and without an error of the first two types: is not counted

Where several definitions fit, the order is that of the authors' tool: localization, classification, duplicate,
background, both. A mended detection goes as well if its object has another detection, or a more certain mended one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .matching import ImageObjects, average_precision, match

FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU
ERRORS = ("classification", "localization", "both", "duplicate", "background", "missed")


@dataclass(frozen=True)
class Detection:
    """A detection that counts. error: '' if it is right; target: what it should have found, (image, object)."""

    label: int
    score: float
    right: bool
    error: str = ""
    target: tuple[int, int] | None = None
    target_label: int = -1
    target_free: bool = False


@dataclass
class Findings:
    """Of a data set: the detections that count, how many objects each class has, and those that were missed."""

    detections: list[Detection] = field(default_factory=list)
    objects: Counter = field(default_factory=Counter)
    missed: Counter = field(default_factory=Counter)
    not_found: Counter = field(default_factory=Counter)  # all objects without a right detection

    def ap50(self) -> float:
        """Percent, the mean over the classes of `objects`; one of no object counts (0) if it has detections."""
        by_class: dict[int, list[Detection]] = {}
        for detection in self.detections:
            by_class.setdefault(detection.label, []).append(detection)
        each = []
        for name, count in self.objects.items():
            found = by_class.get(name, [])
            scores, hits = np.array([d.score for d in found]), np.array([d.right for d in found])
            if count or found:
                each.append(average_precision(scores, hits, count) if count else 0.0)
        return 100 * float(np.mean(each)) if each else 0.0


@dataclass(frozen=True)
class Breakdown:
    """counts: how many errors of each type; gains: points of AP50 that mending them would give.

    false_positives, false_negatives: the gain with none of them.
    """

    ap50: float
    counts: dict[str, int]
    gains: dict[str, float]
    false_positives: float
    false_negatives: float


def break_down(images: Sequence[ImageObjects]) -> Breakdown:
    """The errors of all images of a data set."""
    findings = Findings()
    for number, objects in enumerate(images):
        _add_image(findings, number, objects)
    ap50 = findings.ap50()
    counts = Counter(detection.error for detection in findings.detections if detection.error)
    counts["missed"] = sum(findings.missed.values())

    def gain(mended: Findings) -> float:
        # Fewer points of a curve that is read at 101 places may lower it a little.
        return max(0.0, mended.ap50() - ap50)

    return Breakdown(
        ap50=ap50,
        counts={error: counts[error] for error in ERRORS},
        gains={error: gain(MEND[error](findings)) for error in ERRORS},
        false_positives=gain(replace(findings, detections=[d for d in findings.detections if d.right])),
        false_negatives=gain(replace(findings, objects=_fewer(findings.objects, findings.not_found))),
    )


def _add_image(findings: Findings, number: int, objects: ImageObjects) -> None:
    overlaps = objects.overlaps()
    matches = match(objects, overlaps, FOREGROUND)
    real = ~objects.truth_crowd
    found = set(matches.truth[matches.truth >= 0].tolist())
    mendable = set()
    for i, (name, score) in enumerate(zip(objects.classes.tolist(), objects.scores.tolist())):
        if matches.ignored[i]:
            continue
        if matches.truth[i] >= 0:
            findings.detections.append(Detection(name, score, right=True))
            continue
        error, truth = error_type(objects, np.where(real, overlaps[i], 0.0), name, found)
        if truth is None:
            findings.detections.append(Detection(name, score, False, error))
            continue
        mendable.add(truth)
        findings.detections.append(
            Detection(name, score, False, error, (number, truth), int(objects.truth_classes[truth]), truth not in found)
        )
    for truth in np.flatnonzero(real).tolist():
        name = int(objects.truth_classes[truth])
        findings.objects[name] += 1
        findings.not_found[name] += truth not in found
        findings.missed[name] += truth not in found and truth not in mendable


def error_type(objects: ImageObjects, overlaps: np.ndarray, name: int, found: set[int]) -> tuple[str, int | None]:
    """What is wrong with a false positive, and the object that it should have found, if any.

    overlaps: its IoU with each object, 0 for crowds, [T]; name: its class; found: objects with a right detection.
    """
    if not len(overlaps):
        return "background", None
    same = np.where(objects.truth_classes == name, overlaps, 0.0)
    other = np.where(objects.truth_classes != name, overlaps, 0.0)
    if BACKGROUND <= same.max() < FOREGROUND:
        return "localization", int(same.argmax())
    if other.max() >= FOREGROUND:
        return "classification", int(other.argmax())
    if any(same[truth] >= FOREGROUND for truth in found):
        return "duplicate", None
    return ("background" if overlaps.max() <= BACKGROUND else "both"), None


def _without(error: str) -> Callable[[Findings], Findings]:
    def mend(findings: Findings) -> Findings:
        return replace(findings, detections=[d for d in findings.detections if d.error != error])

    return mend


def _corrected(error: str) -> Callable[[Findings], Findings]:
    def mend(findings: Findings) -> Findings:
        best: dict[tuple[int, int], Detection] = {}
        for detection in findings.detections:
            if detection.error == error and detection.target_free:
                rival = best.get(detection.target)
                if rival is None or detection.score > rival.score:
                    best[detection.target] = detection
        kept = _without(error)(findings).detections
        mended = [replace(each, label=each.target_label, right=True, error="") for each in best.values()]
        return replace(findings, detections=kept + mended)

    return mend


def _without_missed(findings: Findings) -> Findings:
    return replace(findings, objects=_fewer(findings.objects, findings.missed))


def _fewer(objects: Counter, gone: Counter) -> Counter:
    """The difference, zeros included, which Counter's own leaves out."""
    return Counter({name: count - gone[name] for name, count in objects.items()})


MEND: dict[str, Callable[[Findings], Findings]] = {
    "classification": _corrected("classification"),
    "localization": _corrected("localization"),
    "both": _without("both"),
    "duplicate": _without("duplicate"),
    "background": _without("background"),
    "missed": _without_missed,
}
