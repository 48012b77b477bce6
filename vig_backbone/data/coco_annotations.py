"""Check the content of a COCO annotation file (instances); no image is read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from .report import CheckReport

_ID, _NUMBER = (int, str), (int, float)
_COCO_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {"id": _ID, "file_name": (str,), "width": (int,), "height": (int,)},
    "categories": {"id": _ID, "name": (str,)},
    "annotations": {
        **{"id": _ID, "image_id": _ID, "category_id": _ID},
        **{"bbox": (list,), "segmentation": (list, dict), "area": _NUMBER, "iscrowd": (int,)},
    },
}
_NEW_ANNOTATIONS = "download or make the annotation file again"
# The published train2017 file has one box of height 0 on each of these images; loaders filter them.
_KNOWN_FLAT_BOXES = (200365, 550395)


def load_index(path: Path, name: str, report: CheckReport) -> dict | None:
    """The annotation file, or None (with the reason in the report) where it cannot be used."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        report.add(name, f"not valid JSON ({error})", _NEW_ANNOTATIONS)
        return None
    if not isinstance(content, dict):
        report.add(name, "not a JSON object", _NEW_ANNOTATIONS)
        return None
    faults = [fault for key in _COCO_FIELDS for fault in _entry_faults(content.get(key), key)]
    for fault in faults:
        report.add(name, fault, _NEW_ANNOTATIONS)
    if faults:
        return None
    for key in _COCO_FIELDS:
        ids = Counter(entry["id"] for entry in content[key])
        for repeated in (i for i, times in ids.items() if times > 1):
            report.add(name, f"{key}: id {repeated} occurs {ids[repeated]} times", _NEW_ANNOTATIONS)
    return content


def _entry_faults(entries: object, key: str) -> list[str]:
    if not isinstance(entries, list) or not entries:
        return [f"key {key!r} is missing, empty or not a list"]
    faults = []
    for i, entry in enumerate(entries):
        fields = entry if isinstance(entry, dict) else {}
        wrong = [name for name, types in _COCO_FIELDS[key].items() if not isinstance(fields.get(name), types)]
        if wrong:
            faults.append(f"{key}[{i}]: {', '.join(wrong)} missing or of a wrong type")
    return faults


def _is_empty(segmentation: list | dict) -> bool:
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts", "")
        runs = counts if isinstance(counts, list) else [c for c in str(counts) if not (ord(c) - 48) & 32]
        return len(runs) < 2  # the first run is background
    return not any(len(polygon) >= 6 for polygon in segmentation if isinstance(polygon, list))


def _annotation_faults(annotation: dict, image: dict) -> list[str]:
    faults = []
    box, size = annotation["bbox"], (image["width"], image["height"])
    if len(box) != 4 or not all(isinstance(value, _NUMBER) for value in box):
        faults.append(f"bbox {box} is not [x, y, w, h]")
    elif box[2] <= 0 or box[3] <= 0:
        faults.append(f"bbox {box} has no width or height")
    elif min(box[:2]) < -1 or box[0] + box[2] > size[0] + 1 or box[1] + box[3] > size[1] + 1:  # 1 pixel for rounding
        faults.append(f"bbox {box} reaches outside the image of {size[0]}x{size[1]}")
    mask = annotation["segmentation"]
    if _is_empty(mask):
        faults.append("empty segmentation")
    elif isinstance(mask, dict) and mask.get("size") != [size[1], size[0]]:
        faults.append(f"mask size {mask.get('size')} is not [height, width] = [{size[1]}, {size[0]}]")
    return faults


def check_annotations(content: dict, name: str, report: CheckReport) -> None:
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    known = 0
    for annotation in content["annotations"]:
        image = images.get(annotation["image_id"])
        faults = [] if image else [f"refers to unknown image id {annotation['image_id']}"]
        if annotation["category_id"] not in categories:
            faults.append(f"refers to unknown category id {annotation['category_id']}")
        if image:
            faults += _annotation_faults(annotation, image)
        if annotation["image_id"] in _KNOWN_FLAT_BOXES and faults and "no width or height" in faults[0]:
            known, faults = known + 1, faults[1:]
        for fault in faults:
            report.add(name, f"annotation id {annotation['id']}: {fault}", "correct or remove the annotation")
    if known:
        report.notes.append(f"{name}: {known} box(es) of height 0, as in the published file; loaders leave them out")
