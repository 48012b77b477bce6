"""A small data set with exact masks, drawn on the spot: nothing is downloaded.

Coloured shapes and handwritten digits lie on crops of the photos that scikit-image and scikit-learn ship in their
wheels. One call writes the COCO layout (instances) and the ADE20K layout (semantic maps) of the same scenes.
Train and val never share a photo region or a handwritten digit.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .progress import Progress
from .rle import encode_rle
from .toy_photos import photos
from .toy_scene import Scene, Setting, draw_scene

TOY_VERSION = 1
BACKGROUND = "background"
_SHAPE_CLASSES = ("circle", "square", "triangle", "star", "ring", "cross")
EASY_CLASSES = (*_SHAPE_CLASSES, "digit")
HARD_CLASSES = (*_SHAPE_CLASSES, *(f"digit_{i}" for i in range(10)))
# Background, the shapes, the digits: the easy set uses the first 8 entries, the hard set all 17.
PALETTE = [
    *[(90, 90, 90), (230, 57, 53), (48, 99, 230), (250, 190, 40), (240, 85, 170), (40, 200, 215), (65, 185, 75)],
    *[(150, 90, 225), (255, 127, 14), (188, 189, 34), (140, 86, 75), (0, 128, 128), (220, 190, 255)],
    *[(170, 255, 195), (128, 0, 0), (0, 0, 128), (255, 215, 180)],
]
_FOLDERS = {"train": ("train2017", "training"), "val": ("val2017", "validation")}
_SETTINGS = {
    "easy": Setting(
        EASY_CLASSES,
        count=(1, 4),
        size=(0.25, 0.60),
        rotation=15.0,
        min_visible=0.4,
        hues=(0.0, 0.61, 0.125, 0.90, 0.515, 0.35, 0.755),
    ),
    "hard": Setting(HARD_CLASSES, count=(3, 12), size=(0.06, 0.50), rotation=180.0, min_visible=0.25),
}


@dataclass(frozen=True)
class ToyDataSummary:
    """What :func:`make_toy_data` wrote, or found (``already_there``).

    ``things`` are the COCO categories 1..n; ``semantic_classes`` the ADE labels 1..n+1 (``background`` first).
    ``images[split]`` counts images and ``instances[split][name]`` objects, for the splits ``train`` and ``val``.
    """

    root: Path
    coco: Path
    ade: Path
    things: tuple[str, ...]
    semantic_classes: tuple[str, ...]
    images: dict[str, int]
    instances: dict[str, dict[str, int]]
    already_there: bool


def class_names(difficulty: str = "easy", semantic: bool = False) -> tuple[str, ...]:
    """Names of the thing classes; with ``semantic`` the ``background`` comes before them."""
    if difficulty not in _SETTINGS:
        raise ValueError(f"unknown difficulty {difficulty!r}: expected one of {', '.join(_SETTINGS)}")
    things = _SETTINGS[difficulty].things
    return (BACKGROUND, *things) if semantic else things


def make_scene(
    index: int, split: str, canvas: tuple[int, int] = (128, 128), difficulty: str = "easy", seed: int = 0
) -> Scene:
    """Draw scene ``index`` of ``split``: a function of its arguments alone.

    ``canvas`` is (height, width) in pixels. The front object is of class ``index % n``, so that n scenes hold all.
    """
    return draw_scene(_SETTINGS[difficulty], index, split, canvas, seed)


def _annotation(mask: np.ndarray, image_id: int, category_id: int, number: int) -> dict:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": encode_rle(mask),
        "area": int(np.count_nonzero(mask)),
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "iscrowd": 0,
    }


def _link(source: Path, target: Path) -> None:
    """Hard link, else a relative symbolic link, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        try:
            os.symlink(os.path.relpath(source, target.parent), target)
        except OSError:
            shutil.copyfile(source, target)


def _save_scene(scene: Scene, photo: Path, photo_link: Path, label_map: Path) -> None:
    Image.fromarray(scene.image).save(photo, quality=95, subsampling=0)
    _link(photo, photo_link)
    Image.fromarray(scene.semantic).save(label_map)


def _write_split(root: Path, split: str, num: int, arguments: dict, step: Callable[[], None]) -> dict[str, int]:
    """Write one split in both layouts; returns the number of objects a class."""
    coco_name, ade_name = _FOLDERS[split]
    folders = [root / "coco" / coco_name, root / "ade/images" / ade_name, root / "ade/annotations" / ade_name]
    for folder in (root / "coco/annotations", *folders):
        folder.mkdir(parents=True, exist_ok=True)
    height, width = arguments["size"]
    images, annotations = [], []
    for index in range(num):
        scene = make_scene(index, split, (height, width), arguments["difficulty"], arguments["seed"])
        image_id, stem = index + 1, f"{index + 1:012d}"
        _save_scene(scene, folders[0] / f"{stem}.jpg", folders[1] / f"{stem}.jpg", folders[2] / f"{stem}.png")
        images.append({"id": image_id, "file_name": f"{stem}.jpg", "height": height, "width": width})
        for i, label in enumerate(scene.labels):
            mask = scene.instances == i + 1
            annotations.append(_annotation(mask, image_id, label + 1, len(annotations) + 1))
        step()
    things = dict(enumerate(class_names(arguments["difficulty"]), start=1))
    content = {"info": {"description": f"embedded toy data, {arguments['difficulty']}"}, "licenses": []}
    content |= {"images": images, "annotations": annotations}
    content |= {"categories": [{"id": i, "name": name, "supercategory": "toy"} for i, name in things.items()]}
    (root / "coco/annotations" / f"instances_{coco_name}.json").write_text(json.dumps(content))
    return {name: sum(a["category_id"] == i for a in annotations) for i, name in things.items()}


def _write(root: Path, arguments: dict, progress: Progress | None) -> dict:
    """Write the whole set; returns what toy.json holds."""
    numbers = {split: arguments[f"num_{split}"] for split in _FOLDERS}
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, sum(numbers.values()))

    things, semantic = (class_names(arguments["difficulty"], semantic) for semantic in (False, True))
    record = {"version": TOY_VERSION, "arguments": arguments, "things": things, "semantic_classes": semantic}
    record |= {"palette": PALETTE[: len(semantic)], "images": numbers}
    record["instances"] = {split: _write_split(root, split, n, arguments, step) for split, n in numbers.items()}
    (root / "ade/classes.json").write_text(json.dumps(semantic))
    (root / "toy.json").write_text(json.dumps(record, indent=1))
    return record


def _is_whole(root: Path, arguments: dict) -> bool:
    for split, (coco_name, ade_name) in _FOLDERS.items():
        if not (root / "coco/annotations" / f"instances_{coco_name}.json").is_file():
            return False
        for folder in (f"coco/{coco_name}", f"ade/images/{ade_name}", f"ade/annotations/{ade_name}"):
            if len(list((root / folder).glob("*.*g"))) != arguments[f"num_{split}"]:
                return False
    return True


def _summary(root: Path, record: dict, already_there: bool) -> ToyDataSummary:
    things, semantic = tuple(record["things"]), tuple(record["semantic_classes"])
    counts = record["images"], record["instances"]
    return ToyDataSummary(root, root / "coco", root / "ade", things, semantic, *counts, already_there)


def _existing(root: Path, arguments: dict, overwrite: bool) -> ToyDataSummary | None:
    """The summary of a whole set with these arguments, None where one is to be written, else FileExistsError."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    if not (root / "toy.json").is_file():
        raise FileExistsError(f"{root} exists and is no toy data set (it has no toy.json): choose another folder")
    try:
        record = json.loads((root / "toy.json").read_text())
    except ValueError:
        record = {}
    same = record.get("version") == TOY_VERSION and record.get("arguments") == arguments
    if same and _is_whole(root, arguments):
        return _summary(root, record, already_there=True)
    if overwrite:
        return None
    what = "has lost some of its files" if same else f"was made with other arguments ({record.get('arguments')})"
    raise FileExistsError(f"the toy data set in {root} {what}: choose another folder, or overwrite it (--overwrite)")


def _checked_arguments(
    num_train: int, num_val: int, size: int | tuple[int, int], difficulty: str, seed: int
) -> dict[str, int | str | list[int]]:
    class_names(difficulty)
    canvas = [size, size] if isinstance(size, int) else [int(side) for side in size]
    if len(canvas) != 2 or min(canvas) < 32:
        raise ValueError(f"size {size}: expected one side or (height, width), each at least 32 pixels")
    for name, value in (("num_train", num_train), ("num_val", num_val)):
        if value < 1:
            raise ValueError(f"{name} is {value}: expected at least 1")
    if seed < 0:
        raise ValueError(f"seed is {seed}: expected 0 or more")
    return {"num_train": num_train, "num_val": num_val, "size": canvas, "difficulty": difficulty, "seed": seed}


def make_toy_data(
    root: str | Path,
    num_train: int = 160,
    num_val: int = 40,
    size: int | tuple[int, int] = 128,
    difficulty: str = "easy",
    seed: int = 0,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> ToyDataSummary:
    """Write the embedded data set to ``root``: ``coco/`` and ``ade/`` hold the same scenes, ``toy.json`` says how made.

    ``size`` is one side or (height, width) in pixels. The same arguments and library versions give the same bytes.
    ``progress(done, total)`` is called after each image. A split of as many images as there are classes holds every
    class. The set is written beside ``root`` and moved there at the end, so ``root`` is never half made.

    Raises ValueError for wrong arguments, FileExistsError where ``root`` holds something else (a toy data set made with
    other arguments is replaced with ``overwrite``; anything else never is), ImportError without the ``toy`` extra.
    """
    root = Path(root)
    arguments = _checked_arguments(num_train, num_val, size, difficulty, seed)
    found = _existing(root, arguments, overwrite)
    if found:
        return found
    photos()  # without the extra it fails here, before anything is written
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-partial-", dir=root.parent) as beside:
        new = Path(beside) / "new"
        record = _write(new, arguments, progress)
        found = _existing(root, arguments, overwrite)  # another process may have been faster
        if found:
            return found
        if (root / "toy.json").is_file():
            root.rename(Path(beside) / "old")  # deleted with the temporary folder
        elif root.exists():
            root.rmdir()  # empty, or an error
        new.rename(root)
    return _summary(root, record, already_there=False)
