"""Is a COCO or ADE20K folder whole? Every file is read once, and whatever is broken is named."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from .coco_annotations import check_annotations, load_index
from .image_files import BrokenFileError, in_threads, read_image
from .layouts import LAYOUTS, layout_problems, missing_data_message, needed_paths, path_problem
from .progress import Progress
from .report import CheckReport, Problem

_NEW_FILE = "download or unpack it again"


def _start(kind: str, root: Path, splits: Iterable[str], workers: int | None) -> tuple[CheckReport, int]:
    """An empty report with the layout's problems in it, and the number of workers."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}: expected at least 1")
    if not root.is_dir():
        raise FileNotFoundError(missing_data_message(kind, root, layout_problems(kind, root)))
    report = CheckReport(kind, str(root))
    for line in layout_problems(kind, root, splits):
        report.add(*line.split(": ", 1), remedy=f"get it from {LAYOUTS[kind].source.split(',')[0]}")
    return report, workers or os.cpu_count() or 1


def _note_official(report: CheckReport, split: str, count: int) -> None:
    official = LAYOUTS[report.kind].official[split]
    if count != official:
        report.notes.append(f"{split} has {count:,} images; the official {report.kind} set has {official:,}")


# COCO


def _check_coco_split(root: Path, split: str, report: CheckReport) -> list[tuple[str, tuple[int, int]]]:
    """Check everything but the pixels; returns the images to read: path below the root and (width, height)."""
    name, folder = needed_paths("coco", split)
    if path_problem(root / name):
        return []
    content = load_index(root / name, name, report)
    if content is None:
        return []
    check_annotations(content, name, report)
    images = content["images"]
    annotated = {annotation["image_id"] for annotation in content["annotations"]}
    report.counts |= {
        f"{split} images": len(images),
        f"{split} annotations": len(content["annotations"]),
        f"{split} categories": len(content["categories"]),
        f"{split} images without annotations": sum(image["id"] not in annotated for image in images),
    }
    _note_official(report, split, len(images))
    if path_problem(root / folder):
        return []
    report.counts[f"{split} files not listed"] = len(set(os.listdir(root / folder)) - {i["file_name"] for i in images})
    there = []
    for image in images:
        file = f"{folder}/{image['file_name']}"
        if (root / file).is_file():
            there.append((file, (image["width"], image["height"])))
        else:
            report.add(file, f"missing, but listed in {name}", _NEW_FILE)
    return there


def check_coco(
    root: str | Path,
    splits: Iterable[str] = ("train", "val"),
    workers: int | None = None,
    full: bool = True,
    progress: Progress | None = None,
) -> CheckReport:
    """Check a folder in COCO layout (instances). With ``full`` every listed image is decoded (``workers`` threads).

    Raises FileNotFoundError, with the expected layout, where ``root`` is no folder; ValueError for wrong arguments.
    """
    root, splits = Path(root), tuple(splits)
    report, workers = _start("coco", root, splits, workers)

    def job(item: tuple[str, tuple[int, int]]) -> Problem | None:
        file, size = item
        try:
            image = read_image(root / file)
        except BrokenFileError as error:
            return Problem(file, str(error), _NEW_FILE)
        if image.size == size:
            return None
        what = f"is {image.width}x{image.height}, the annotation file says {size[0]}x{size[1]}"
        return Problem(file, what, "the image or the annotation file is of another version: get both again")

    images = [image for split in splits for image in _check_coco_split(root, split, report)]
    if full:
        report.problems += filter(None, in_threads(job, images, workers, progress))
    return report


# ADE20K


def _check_label_map(path: Path, image: Image.Image | None, num_classes: int) -> tuple[list[str], bool]:
    """Faults of an annotation and whether it labels nothing at all. ``image`` is None where it could not be read."""
    label_map = read_image(path)
    if label_map.mode not in ("L", "P"):
        return [f"mode {label_map.mode}: expected one channel of 8 bits (L, or P with indices)"], False
    faults = []
    if image and image.size != label_map.size:
        faults.append(f"is {label_map.width}x{label_map.height}, its image {image.width}x{image.height}")
    found = np.flatnonzero(np.bincount(np.asarray(label_map).ravel(), minlength=256))
    if found[-1] > num_classes:
        wrong = ", ".join(str(value) for value in found[found > num_classes][:5])
        faults.append(f"label values above {num_classes}: {wrong}")
    return faults, bool(found[-1] == 0)


def _check_pairs(root: Path, split: str, report: CheckReport) -> list[tuple[str, str]]:
    """Compare the file names of a split; returns the pairs (image, annotation), as paths below the root."""
    folders = needed_paths("ade20k", split)
    if any(path_problem(root / folder) for folder in folders):
        return []
    stems = [{path.stem for path in (root / f).glob(f"*{s}")} for f, s in zip(folders, (".jpg", ".png"))]
    report.counts |= {f"{split} images": len(stems[0]), f"{split} annotations": len(stems[1])}
    _note_official(report, split, len(stems[0]))
    files = [{stem: f"{folder}/{stem}{s}" for stem in st} for folder, st, s in zip(folders, stems, (".jpg", ".png"))]
    for stem in sorted(stems[0] - stems[1]):
        report.add(files[0][stem], f"has no annotation ({folders[1]}/{stem}.png is missing)", _NEW_FILE)
    for stem in sorted(stems[1] - stems[0]):
        report.add(files[1][stem], f"has no image ({folders[0]}/{stem}.jpg is missing)", _NEW_FILE)
    if not stems[0] & stems[1]:
        report.add(folders[0], "holds no *.jpg with a *.png of the same name", "check that this is the right folder")
    return [(files[0][stem], files[1][stem]) for stem in sorted(stems[0] & stems[1])]


def check_ade20k(
    root: str | Path,
    splits: Iterable[str] = ("train", "val"),
    workers: int | None = None,
    full: bool = True,
    num_classes: int = 150,
    progress: Progress | None = None,
) -> CheckReport:
    """Check a folder in ADE20K layout. With ``full`` every image and label map is decoded (``workers`` threads).

    Labels are 0 (unlabelled) to ``num_classes``. Raises FileNotFoundError, with the expected layout, where ``root`` is
    no folder; ValueError for wrong arguments.
    """
    if not 1 <= num_classes <= 255:
        raise ValueError(f"num_classes is {num_classes}: expected 1 to 255")
    root, splits = Path(root), tuple(splits)
    report, workers = _start("ade20k", root, splits, workers)

    def job(pair: tuple[str, str]) -> tuple[list[Problem], bool]:
        problems, image, unlabelled = [], None, False
        try:
            image = read_image(root / pair[0])
        except BrokenFileError as error:
            problems.append(Problem(pair[0], str(error), _NEW_FILE))
        try:
            faults, unlabelled = _check_label_map(root / pair[1], image, num_classes)
            problems += [Problem(pair[1], fault, "replace it by the right label map") for fault in faults]
        except BrokenFileError as error:
            problems.append(Problem(pair[1], str(error), _NEW_FILE))
        return problems, unlabelled

    pairs = [pair for split in splits for pair in _check_pairs(root, split, report)]
    if full:
        results = in_threads(job, pairs, workers, progress)
        report.problems += [problem for problems, _ in results for problem in problems]
        report.counts["label maps without any label"] = sum(unlabelled for _, unlabelled in results)
    return report
