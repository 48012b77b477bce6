"""Is a COCO or ADE20K folder whole? Every file is read once, and whatever is broken is named."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TextIO

import numpy as np
from PIL import Image

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Layout:
    """What a data set's folder looks like and where its content comes from."""

    name: str
    tree: str
    source: str
    splits: dict[str, tuple[str, ...]]  # what a split needs; a name with a dot is a file, the others are folders
    official: dict[str, int]  # images a split


LAYOUTS = {
    "coco": Layout(
        "COCO 2017",
        """\
├── annotations/
│   ├── instances_train2017.json
│   └── instances_val2017.json
├── train2017/   000000000009.jpg ...
└── val2017/     000000000139.jpg ...""",
        "cocodataset.org, page Download: the 2017 train and val images (train2017.zip, val2017.zip) and the 2017 "
        "train/val annotations (annotations_trainval2017.zip), all unpacked in this folder",
        {s: (f"annotations/instances_{s}2017.json", f"{s}2017") for s in ("train", "val")},
        {"train": 118287, "val": 5000},
    ),
    "ade20k": Layout(
        "ADE20K",
        """\
├── images/
│   ├── training/     ADE_train_00000001.jpg ...
│   └── validation/   ADE_val_00000001.jpg ...
└── annotations/
    ├── training/     ADE_train_00000001.png ...
    └── validation/   ADE_val_00000001.png ...""",
        "the MIT scene parsing benchmark, sceneparsing.csail.mit.edu: the archive ADEChallengeData2016, unpacked; its "
        "top folder is the one to name",
        {
            s: (f"images/{folder}", f"annotations/{folder}")
            for s, folder in (("train", "training"), ("val", "validation"))
        },
        {"train": 20210, "val": 2000},
    ),
}


@dataclass(frozen=True)
class Problem:
    """``file`` is relative to the checked folder; ``what`` is wrong; ``remedy`` says what to do."""

    file: str
    what: str
    remedy: str


@dataclass
class CheckReport:
    """Result of a check: ``counts`` and ``notes`` inform, ``problems`` are what makes the set broken."""

    kind: str
    root: str
    counts: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def add(self, file: str, what: str, remedy: str) -> None:
        self.problems.append(Problem(file, what, remedy))

    def to_dict(self) -> dict:
        """Plain lists and dicts, ready for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def text(self, limit: int = 50) -> str:
        """The report for a terminal, with at most ``limit`` problems."""
        lines = [f"{LAYOUTS[self.kind].name} in {self.root}"]
        lines += [f"  {name}: {count:,}" for name, count in self.counts.items()]
        lines += [f"  note: {note}" for note in self.notes]
        if self.ok:
            return "\n".join([*lines, "whole: nothing is broken"])
        lines.append(f"broken: {len(self.problems):,} problem(s)")
        lines += [f"  {p.file}: {p.what} -> {p.remedy}" for p in self.problems[:limit]]
        if len(self.problems) > limit:
            lines.append(f"  ... and {len(self.problems) - limit:,} more")
        return "\n".join(lines)


class ProgressLine:
    """Callable (done, total) that draws a bar on a terminal, and in a log writes a line every ``every`` seconds."""

    def __init__(self, label: str, stream: TextIO, every: float = 5.0) -> None:
        self.label, self.stream = label, stream
        self.every = 0.1 if stream.isatty() else every
        self.start: float | None = None  # the first call

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.start is None:
            self.start = self.last = now
        if done < total and now - self.last < self.every:
            return
        self.last = now
        share = done / total if total else 1.0
        left = (now - self.start) / share * (1 - share) if share else 0.0
        numbers = f"{self.label} {done:,}/{total:,} ({share:.0%}), {left:.0f} s left"
        if self.stream.isatty():
            bar = "#" * round(30 * share)
            self.stream.write(f"\r[{bar:<30}] {numbers}   " + ("\n" if done == total else ""))
        else:
            self.stream.write(numbers + "\n")
        self.stream.flush()


def missing_data_message(kind: str, folder: str | Path, missing: list[str]) -> str:
    """What to tell a user whose data set is not there: what is missing, the layout, the source, the way around."""
    layout = LAYOUTS[kind]
    indent = "\n    "
    return (
        f"{layout.name} is missing or incomplete in {folder}:\n"
        + "".join(f"  - {item}\n" for item in missing)
        + f"Expected layout:\n    {folder}/{indent}{layout.tree.replace(chr(10), indent)}\n"
        + f"Where to get it: {layout.source}.\n"
        + "Without a download: `python tools/make_toy_data.py data/toy` writes a small embedded set in both layouts "
        + "(data/toy/coco and data/toy/ade)."
    )


def _path_problem(path: Path) -> str | None:
    """Why a required file (its name has a dot) or folder cannot be used."""
    if not path.exists():
        return "missing" if not path.is_symlink() else "a link that points to nothing"
    if "." in path.name:
        if not path.is_file():
            return "not a file"
        return None if path.stat().st_size else "empty (0 bytes)"
    if not path.is_dir():
        return "a file where a folder is expected (perhaps a symbolic link that was unpacked as text)"
    return None if next(path.iterdir(), None) else "an empty folder"


def layout_problems(kind: str, root: str | Path, splits: Iterable[str] = ("train", "val")) -> list[str]:
    """A quick look: which folders and annotation files are missing or empty. No image is read."""
    root = Path(root)
    if not root.is_dir():
        return [f"{root}: {'missing' if not root.exists() else 'not a folder'}"]
    paths = [path for split in splits for path in _needs(kind, split)]
    found = [(path, _path_problem(root / path)) for path in paths]
    return [f"{path}: {what}" for path, what in found if what]


def _needs(kind: str, split: str) -> tuple[str, ...]:
    splits = LAYOUTS[kind].splits
    if split not in splits:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(splits)}")
    return splits[split]


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


class _BrokenFileError(Exception):
    """Says what is wrong with one file."""


def _read_image(path: Path) -> Image.Image:
    """Decode a file to its last byte. Raises _BrokenFileError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _BrokenFileError(f"cannot be read ({error.strerror})") from error
    if not data:
        raise _BrokenFileError("empty file (0 bytes)")
    try:
        image = Image.open(BytesIO(data))
        if image.format == "PNG":  # load() does not compare the checksums
            image.verify()
            image = Image.open(BytesIO(data))
        image.load()
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, zlib.error ...
        raise _BrokenFileError(f"truncated or damaged ({str(error).replace('<_io.BytesIO object', '<')})") from error
    # Inside the coded data a marker never occurs, so a whole JPEG has an end marker behind its last scan.
    if image.format in ("JPEG", "MPO") and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise _BrokenFileError("truncated (no end-of-image marker)")
    if image.format == "PNG" and b"IEND\xaeB`\x82" not in data[-4096:]:  # its checksum included
        raise _BrokenFileError("truncated (no end chunk)")
    return image


def _in_threads(job: Callable, items: list, workers: int, progress: Progress | None) -> list:
    """``job`` on each item, in order. Decoding releases the interpreter's lock, so threads are enough."""
    results = []
    with ThreadPoolExecutor(workers) as pool:
        for result in pool.map(job, items):
            results.append(result)
            if progress:
                progress(len(results), len(items))
    return results


# COCO

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
_NEW_FILE = "download or unpack it again"
# The published train2017 file has one box of height 0 on each of these images; loaders filter them.
_KNOWN_FLAT_BOXES = (200365, 550395)


def _load_index(path: Path, name: str, report: CheckReport) -> dict | None:
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


def _check_annotations(content: dict, name: str, report: CheckReport) -> None:
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


def _check_coco_split(root: Path, split: str, report: CheckReport) -> list[tuple[str, tuple[int, int]]]:
    """Check everything but the pixels; returns the images to read: path below the root and (width, height)."""
    name, folder = _needs("coco", split)
    if _path_problem(root / name):
        return []
    content = _load_index(root / name, name, report)
    if content is None:
        return []
    _check_annotations(content, name, report)
    images = content["images"]
    annotated = {annotation["image_id"] for annotation in content["annotations"]}
    report.counts |= {
        f"{split} images": len(images),
        f"{split} annotations": len(content["annotations"]),
        f"{split} categories": len(content["categories"]),
        f"{split} images without annotations": sum(image["id"] not in annotated for image in images),
    }
    _note_official(report, split, len(images))
    if _path_problem(root / folder):
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
            image = _read_image(root / file)
        except _BrokenFileError as error:
            return Problem(file, str(error), _NEW_FILE)
        if image.size == size:
            return None
        what = f"is {image.width}x{image.height}, the annotation file says {size[0]}x{size[1]}"
        return Problem(file, what, "the image or the annotation file is of another version: get both again")

    images = [image for split in splits for image in _check_coco_split(root, split, report)]
    if full:
        report.problems += filter(None, _in_threads(job, images, workers, progress))
    return report


# ADE20K


def _check_label_map(path: Path, image: Image.Image | None, num_classes: int) -> tuple[list[str], bool]:
    """Faults of an annotation and whether it labels nothing at all. ``image`` is None where it could not be read."""
    label_map = _read_image(path)
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
    folders = _needs("ade20k", split)
    if any(_path_problem(root / folder) for folder in folders):
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
            image = _read_image(root / pair[0])
        except _BrokenFileError as error:
            problems.append(Problem(pair[0], str(error), _NEW_FILE))
        try:
            faults, unlabelled = _check_label_map(root / pair[1], image, num_classes)
            problems += [Problem(pair[1], fault, "replace it by the right label map") for fault in faults]
        except _BrokenFileError as error:
            problems.append(Problem(pair[1], str(error), _NEW_FILE))
        return problems, unlabelled

    pairs = [pair for split in splits for pair in _check_pairs(root, split, report)]
    if full:
        results = _in_threads(job, pairs, workers, progress)
        report.problems += [problem for problems, _ in results for problem in problems]
        report.counts["label maps without any label"] = sum(unlabelled for _, unlabelled in results)
    return report
