"""What is in a split: objects or pixels of each class, sizes of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .browse import load_original

SMALL, LARGE = 32**2, 96**2  # pixels of a box: COCO's limits


@dataclass(frozen=True)
class Statistics:
    """facts: of the whole split; heads and rows: a table with a row for each class."""

    facts: dict[str, Any]
    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    def text(self) -> str:
        """For a terminal."""
        lines = [f"  {name}: {_cell(value)}" for name, value in self.facts.items()]
        cells = [list(self.heads), *([_cell(value) for value in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        for name, *values in cells:
            lines.append("  ".join([f"  {name:{widths[0]}}", *(v.rjust(w) for v, w in zip(values, widths[1:]))]))
        return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def detection_statistics(dataset: Any) -> Statistics:
    """Of all annotations; no image is read. Sizes are those of boxes in the image as it is on disk."""
    classes = dataset.metainfo["classes"]
    objects = np.zeros((len(classes), 3), dtype=np.int64)  # small, medium, large
    images, crowds, per_image, sizes = Counter(), 0, [], []
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        real = [each for each in info["instances"] if not each.get("ignore_flag")]
        crowds += len(info["instances"]) - len(real)
        per_image.append(len(real))
        if "width" in info:
            sizes.append((info["height"], info["width"]))
        for each in real:
            x1, y1, x2, y2 = each["bbox"]
            area = (x2 - x1) * (y2 - y1)
            objects[each["bbox_label"], int(area >= SMALL) + int(area >= LARGE)] += 1
        images.update({each["bbox_label"] for each in real})
    total = max(1, int(objects.sum()))
    facts = {
        "images": len(dataset),
        "without an object": per_image.count(0),
        "objects": int(objects.sum()),
        "crowd regions": crowds,
        "objects an image, mean": float(np.mean(per_image)),
        "objects an image, most": max(per_image),
        **_size_facts(sizes),
    }
    rows = [
        [name, int(each.sum()), float(100 * each.sum() / total), images[i], *map(int, each)]
        for i, (name, each) in enumerate(zip(classes, objects))
    ]
    return Statistics(facts, ("class", "objects", "%", "images", "small", "medium", "large"), rows)


def segmentation_statistics(dataset: Any, most: int) -> Statistics:
    """Of the label maps of at most `most` images, evenly taken from the split."""
    classes = dataset.metainfo["classes"]
    taken = np.unique(np.linspace(0, len(dataset) - 1, min(most, len(dataset))).round().astype(int)).tolist()
    pixels, images, unlabelled, sizes = np.zeros(len(classes), dtype=np.int64), Counter(), 0, []
    for i in taken:
        labels = np.asarray(load_original(dataset, i, image=False)["gt_seg_map"])
        sizes.append(labels.shape[:2])
        found, counts = np.unique(labels, return_counts=True)
        for label, count in zip(found.tolist(), counts.tolist()):
            if 0 <= label < len(classes):
                pixels[label] += count
                images[label] += 1
            else:
                unlabelled += count
    labelled = max(1, int(pixels.sum()))
    facts = {
        "images": len(dataset),
        "label maps read": len(taken),
        "unlabelled pixels, %": float(100 * unlabelled / max(1, unlabelled + pixels.sum())),
        **_size_facts(sizes),
    }
    rows = [[name, int(pixels[i]), float(100 * pixels[i] / labelled), images[i]] for i, name in enumerate(classes)]
    return Statistics(facts, ("class", "pixels", "%", "images"), rows)


def _size_facts(sizes: list[tuple[int, int]]) -> dict[str, str]:
    """The smallest, the median and the largest by pixels, height x width."""
    if not sizes:
        return {}
    ordered = sorted(sizes, key=lambda size: size[0] * size[1])
    places = {"smallest": 0, "median": len(ordered) // 2, "largest": -1}
    return {f"{name} image": "{} x {}".format(*ordered[place]) for name, place in places.items()}
