"""A small data set with exact masks, drawn on the spot: nothing is downloaded.

Coloured shapes and handwritten digits lie on crops of the photos that scikit-image and scikit-learn ship in their
wheels. One call writes the COCO layout (instances) and the ADE20K layout (semantic maps) of the same scenes.
Train and val never share a photo region or a handwritten digit.
"""

from __future__ import annotations

import colorsys
import importlib.util
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

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
_SPLITS = {"train": ("train2017", "training"), "val": ("val2017", "validation")}
_EASY_HUES = (0.0, 0.61, 0.125, 0.90, 0.515, 0.35, 0.755)  # one a class, in the order of EASY_CLASSES
_TRAIN_PART = 0.58  # train crops come from the left part of each photo, val crops from the rest
_TRAIN_DIGITS = 1400  # of 1,797 handwritten digits
_MIN_PIXELS = 30  # visible pixels that an object needs to be kept
_COLOUR_PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
_GREY_PHOTOS = {"brick.png": (178, 100, 78), "grass.png": (98, 146, 74), "gravel.png": (158, 146, 128)}  # name: tint


@dataclass(frozen=True)
class _Setting:
    """What a difficulty means: number of objects, size (share of the shorter side), rotation (degrees), visibility."""

    things: tuple[str, ...]
    count: tuple[int, int]
    size: tuple[float, float]
    rotation: float
    min_visible: float


_SETTINGS = {
    "easy": _Setting(EASY_CLASSES, (1, 4), (0.25, 0.60), rotation=15.0, min_visible=0.4),
    "hard": _Setting(HARD_CLASSES, (3, 12), (0.06, 0.50), rotation=180.0, min_visible=0.25),
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


# Shapes: signed distances (negative inside) on object coordinates u, v, where the object has radius about 1.


def _polygon(u: np.ndarray, v: np.ndarray, corners: np.ndarray, rounding: float = 0.0) -> np.ndarray:
    squared = np.full(u.shape, np.inf)
    inside = np.zeros(u.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0)):
        ex, ey = bx - ax, by - ay
        along = np.clip(((u - ax) * ex + (v - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        squared = np.minimum(squared, (u - ax - ex * along) ** 2 + (v - ay - ey * along) ** 2)
        if ey:
            inside ^= ((ay > v) != (by > v)) & (u < ax + ex * (v - ay) / ey)
    return np.where(inside, -1.0, 1.0) * np.sqrt(squared) - rounding


def _spokes(radii: list[float]) -> np.ndarray:
    """Corners at equal angles, the first one at the top."""
    angles = 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.asarray(radii)[:, None] * np.stack([np.sin(angles), -np.cos(angles)], axis=1)


def _plus(arm: float, half: float) -> np.ndarray:
    quarter = np.array([(half, -arm), (half, -half), (arm, -half)])
    turn = np.array([(0, -1), (1, 0)])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn.T, i) for i in range(4)])


def _box(half: float) -> np.ndarray:
    return np.array([(-half, -half), (half, -half), (half, half), (-half, half)])


_SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda u, v: np.hypot(u, v) - 0.95,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.72) - 0.24,
    "square": partial(_polygon, corners=_box(0.82)),
    "triangle": partial(_polygon, corners=_spokes([1.1] * 3)),
    "star": partial(_polygon, corners=_spokes([1.1, 0.5] * 5)),
    "cross": partial(_polygon, corners=_plus(0.95, 0.32)),
    "digit": partial(_polygon, corners=_box(0.68), rounding=0.16),
}


# Photos and digits


@lru_cache(maxsize=1)
def _photos() -> list[Image.Image]:
    try:
        from sklearn.datasets import load_sample_images

        # The files are read by path: skimage.data would ask its downloader.
        folder = Path(importlib.util.find_spec("skimage").origin).parent / "data"
    except (ImportError, AttributeError) as error:
        raise ImportError("the toy data needs scikit-image and scikit-learn: pip install 'vig-dense[toy]'") from error
    photos = [Image.open(folder / name).convert("RGB") for name in _COLOUR_PHOTOS]
    for name, tint in _GREY_PHOTOS.items():
        photos.append(ImageOps.colorize(Image.open(folder / name).convert("L"), "black", "white", mid=tint))
    return photos + [Image.fromarray(image) for image in load_sample_images().images]


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digits as smooth glyphs [1797, 96, 96] (uint8, with a dark border), and their values."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = [Image.fromarray(np.pad(image * (255 / 16), 1).astype(np.uint8)) for image in digits.images]
    return np.stack([np.asarray(g.resize((96, 96), Image.Resampling.BICUBIC)) for g in small]), digits.target


def _photo_crop(
    rng: np.random.Generator, split: str, height: int, width: int, photo: Image.Image | None = None
) -> np.ndarray:
    """A random crop [height, width, 3] in 0..1 from the part of a (random) photo that belongs to the split."""
    if photo is None:
        photo = _photos()[rng.integers(len(_photos()))]
    border = int(photo.width * _TRAIN_PART)
    left, right = (0, border) if split == "train" else (border, photo.width)
    crop_w = min(right - left, photo.height * width / height) * rng.uniform(0.65, 1.0)
    crop_h = crop_w * height / width
    x = left + rng.uniform(0, right - left - crop_w)
    y = rng.uniform(0, photo.height - crop_h)
    box = (x, y, min(x + crop_w, right), min(y + crop_h, photo.height))
    crop = np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC, box=box), np.float64) / 255
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def _glyph(rng: np.random.Generator, name: str, split: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Coverage [h, w] of a handwritten digit; ``digit`` takes any, ``digit_7`` a seven."""
    glyphs, values = _digits()
    pool = np.arange(_TRAIN_DIGITS) if split == "train" else np.arange(_TRAIN_DIGITS, len(values))
    if "_" in name:
        pool = pool[values[pool] == int(name.rpartition("_")[2])]
    glyph = glyphs[rng.choice(pool)] / 255
    column, row = (np.rint((c / 0.8 + 1) / 2 * 95).astype(int) for c in (u, v))
    inside = (column >= 0) & (column < 96) & (row >= 0) & (row < 96)
    value = glyph[np.clip(row, 0, 95), np.clip(column, 0, 95)]
    return np.where(inside, np.clip((value - 0.35) / 0.3, 0, 1), 0.0)


# Scenes


@dataclass(frozen=True)
class _Object:
    label: int  # index into the thing classes
    window: tuple[slice, slice]  # the part of the canvas that the arrays below cover
    alpha: np.ndarray  # [h, w] in 0..1
    colour: np.ndarray  # [h, w, 3]
    shadow: np.ndarray  # [h, w] in 0..1

    @property
    def mask(self) -> np.ndarray:
        """Pixels whose centre lies inside the shape."""
        return self.alpha >= 0.5


@dataclass(frozen=True)
class Scene:
    """``image`` uint8 [H, W, 3]; ``instances`` int [H, W], 0 = background, i + 1 = object i of class ``labels[i]``."""

    image: np.ndarray
    instances: np.ndarray
    labels: list[int]

    @property
    def semantic(self) -> np.ndarray:
        """uint8 [H, W]: 1 = background, 2.. = thing classes (0, unlabelled, does not occur)."""
        return np.array([1, *(label + 2 for label in self.labels)], np.uint8)[self.instances]


def _texture(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Stripes, checks, a cloud or nothing: factors [h, w] around 1."""
    kind, strength, period = rng.integers(4), rng.uniform(0.06, 0.16), rng.uniform(8, 16)
    if kind == 0:
        return 1 + strength * np.sign(np.sin(u * period))
    if kind == 1:
        return 1 + strength * np.sign(np.sin(u * period) * np.sin(v * period))
    if kind == 2:
        coarse = Image.fromarray(rng.standard_normal((6, 6)).astype(np.float32))
        return 1 + strength * np.asarray(coarse.resize(u.shape[::-1], Image.Resampling.BICUBIC), np.float64)
    return np.ones_like(u)


def _surface(
    rng: np.random.Generator, name: str, label: int, hard: bool, split: str, u: np.ndarray, v: np.ndarray
) -> np.ndarray:
    """Unlit colours [h, w, 3] of an object, glyph included."""
    card = name.startswith("digit")
    if hard:
        hue, saturation, value = rng.uniform(), rng.uniform(0.35, 1.0), rng.uniform(0.35, 1.0)
    else:
        hue = (_EASY_HUES[label] + rng.normal(0, 0.012)) % 1
        saturation, value = rng.uniform(0.75, 0.95), rng.uniform(0.78, 1.0)
    if card:  # dark enough for a bright glyph
        value *= 0.7
    colour = np.array(colorsys.hsv_to_rgb(hue, saturation, value)) * np.ones((*u.shape, 1))
    if hard and rng.random() < 0.6:
        mix = rng.uniform(0.2, 0.4) if card else rng.uniform(0.3, 0.7)
        colour = (1 - mix) * colour + mix * _photo_crop(rng, split, *u.shape)
    else:
        colour = colour * _texture(rng, u, v)[..., None]
    if card:
        glyph = _glyph(rng, name, split, u, v)[..., None]
        colour = (1 - glyph) * colour + glyph * rng.uniform(0.9, 1.0, 3)
    return colour


def _make_object(
    rng: np.random.Generator, label: int, setting: _Setting, split: str, canvas: tuple[int, int], light: float
) -> _Object:
    """One object at a random place. ``light`` is the direction, in radians, from which the scene is lit."""
    height, width = canvas
    name, hard = setting.things[label], setting is _SETTINGS["hard"]
    share = math.exp(rng.uniform(*np.log(setting.size)))
    radius = max(share * min(canvas), 16 if name.startswith("digit") else 10) / 2
    margin = radius * (0.6 if hard else 1.0)  # hard objects may be cut by the border
    cx, cy = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
    # A six that stands on its head is a nine: digits turn by 45 degrees at most.
    limit = min(setting.rotation, 45.0) if name.startswith("digit") else setting.rotation
    angle = math.radians(rng.uniform(-limit, limit))

    reach = radius * 1.25 + 4
    window = (
        slice(max(0, int(cy - reach)), min(height, int(cy + reach) + 1)),
        slice(max(0, int(cx - reach)), min(width, int(cx + reach) + 1)),
    )
    y, x = (grid + 0.5 for grid in np.mgrid[window])
    dx, dy = (x - cx) / radius, (y - cy) / radius
    u, v = math.cos(angle) * dx + math.sin(angle) * dy, math.cos(angle) * dy - math.sin(angle) * dx
    shape = _SHAPES[name.partition("_")[0]]
    distance = shape(u, v) * radius  # in pixels

    towards_light = dx * math.cos(light) + dy * math.sin(light)
    rim = np.clip(-distance / (0.08 * radius + 1), 0, 1)
    lit = (1 + 0.2 * towards_light) * (0.72 + 0.28 * rim)
    colour = _surface(rng, name, label, hard, split, u, v) * lit[..., None]
    offset = [round(-math.sin(light) * 0.08 * radius), round(-math.cos(light) * 0.08 * radius)]
    shadow = np.clip(0.5 - np.roll(distance, offset, axis=(0, 1)) / (0.12 * radius + 2), 0, 1)
    return _Object(label, window, np.clip(0.5 - distance, 0, 1), np.clip(colour, 0, 1), shadow)


def _place_objects(
    rng: np.random.Generator, first: int, setting: _Setting, split: str, canvas: tuple[int, int], light: float
) -> list[_Object]:
    """Objects from front to back. One that those in front hide too much is drawn again, in the end left out."""
    taken = np.zeros(canvas, bool)
    placed: list[_Object] = []
    for i in range(rng.integers(setting.count[0], setting.count[1] + 1)):
        label = first if i == 0 else int(rng.integers(len(setting.things)))
        for _ in range(20):
            item = _make_object(rng, label, setting, split, canvas, light)
            visible = np.count_nonzero(item.mask & ~taken[item.window])
            if visible >= max(_MIN_PIXELS, setting.min_visible * np.count_nonzero(item.mask)):
                taken[item.window] |= item.mask
                placed.append(item)
                break
    return placed


def make_scene(
    index: int, split: str, canvas: tuple[int, int] = (128, 128), difficulty: str = "easy", seed: int = 0
) -> Scene:
    """Draw scene ``index`` of ``split``: a function of its arguments alone.

    ``canvas`` is (height, width) in pixels. The front object is of class ``index % n``, so that n scenes hold all.
    """
    setting = _SETTINGS[difficulty]
    rng = np.random.default_rng([seed, list(_SPLITS).index(split), index])
    deal, card = divmod(index, len(_photos()))  # photos are dealt like cards: each once before any again
    order = np.random.default_rng([seed, list(_SPLITS).index(split), deal, 1]).permutation(len(_photos()))
    picture = _photo_crop(rng, split, *canvas, photo=_photos()[order[card]])
    if difficulty == "easy":  # paler than the objects
        picture = 0.3 * picture.mean(axis=2, keepdims=True) + 0.7 * picture
    picture = picture * rng.uniform(0.8, 1.05)
    light = rng.uniform(-math.pi, 0)  # somewhere above
    objects = _place_objects(rng, index % len(setting.things), setting, split, canvas, light)[::-1]

    instances = np.zeros(canvas, np.int32)
    for number, item in enumerate(objects, start=1):  # back to front
        region = picture[item.window]
        region *= 1 - 0.45 * item.shadow[..., None]
        region += item.alpha[..., None] * (item.colour - region)
        instances[item.window][item.mask] = number
    picture += rng.normal(0, 0.012, picture.shape)
    image = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    return Scene(image, instances, [item.label for item in objects])


# Writing


def encode_rle(mask: np.ndarray) -> dict:
    """A bool mask [H, W] as COCO's compressed run lengths, the same string that pycocotools makes."""
    flat = mask.ravel(order="F").astype(np.int8)
    edges = np.flatnonzero(np.diff(flat, prepend=0))
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    text = []
    for i, run in enumerate(runs):
        value, more = (run - runs[i - 2] if i > 2 else run), True
        while more:  # five bits a character; bit 5 says that more follow, bit 4 of the last one is the sign
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text.append(chr(48 + (bits | 32 * more)))
    return {"size": list(mask.shape), "counts": "".join(text)}


def decode_rle(rle: dict) -> np.ndarray:
    """The bool mask [H, W] of COCO's compressed run lengths."""
    runs: list[int] = []
    value = shift = 0
    for char in rle["counts"].encode():
        value |= ((char - 48) & 31) << shift
        shift += 5
        if (char - 48) & 32:
            continue
        if (char - 48) & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(rle["size"], order="F")


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
            target.symlink_to(os.path.relpath(source, target.parent))
        except OSError:
            shutil.copyfile(source, target)


def _write_split(root: Path, split: str, num: int, arguments: dict, step: Callable[[], None]) -> dict[str, int]:
    """Write one split in both layouts; returns the number of objects a class."""
    things = class_names(arguments["difficulty"])
    coco_name, ade_name = _SPLITS[split]
    folders = [root / "coco" / coco_name, root / "ade/images" / ade_name, root / "ade/annotations" / ade_name]
    for folder in (root / "coco/annotations", *folders):
        folder.mkdir(parents=True, exist_ok=True)
    height, width = arguments["size"]
    images, annotations = [], []
    for index in range(num):
        scene = make_scene(index, split, (height, width), arguments["difficulty"], arguments["seed"])
        image_id, stem = index + 1, f"{index + 1:012d}"
        photo = folders[0] / f"{stem}.jpg"
        Image.fromarray(scene.image).save(photo, quality=95, subsampling=0)
        _link(photo, folders[1] / photo.name)
        Image.fromarray(scene.semantic).save(folders[2] / f"{stem}.png")
        images.append({"id": image_id, "file_name": photo.name, "height": height, "width": width})
        for i, label in enumerate(scene.labels):
            mask = scene.instances == i + 1
            annotations.append(_annotation(mask, image_id, label + 1, len(annotations) + 1))
        step()
    categories = [{"id": i, "name": name, "supercategory": "toy"} for i, name in enumerate(things, start=1)]
    content = {"info": {"description": f"embedded toy data, {arguments['difficulty']}"}, "licenses": []}
    content |= {"images": images, "annotations": annotations, "categories": categories}
    (root / "coco/annotations" / f"instances_{coco_name}.json").write_text(json.dumps(content))
    return {name: sum(a["category_id"] == i for a in annotations) for i, name in enumerate(things, start=1)}


def _is_whole(root: Path, arguments: dict) -> bool:
    for split, (coco_name, ade_name) in _SPLITS.items():
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
    progress: Callable[[int, int], None] | None = None,
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
    _photos()
    done, total = 0, num_train + num_val

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    record = {"version": TOY_VERSION, "arguments": arguments, "things": class_names(difficulty)}
    record |= {"semantic_classes": class_names(difficulty, semantic=True)}
    record |= {"palette": PALETTE[: len(record["semantic_classes"])], "images": {"train": num_train, "val": num_val}}
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-partial-", dir=root.parent) as beside:
        new = Path(beside) / "new"
        record["instances"] = {s: _write_split(new, s, n, arguments, step) for s, n in record["images"].items()}
        (new / "ade/classes.json").write_text(json.dumps(record["semantic_classes"]))
        (new / "toy.json").write_text(json.dumps(record, indent=1))
        found = _existing(root, arguments, overwrite)  # another process may have been faster
        if found:
            return found
        if (root / "toy.json").is_file():
            root.rename(Path(beside) / "old")  # deleted with the temporary folder
        elif root.exists():
            root.rmdir()  # empty, or an error
        new.rename(root)
    return _summary(root, record, already_there=False)


def draw_contact_sheet(root: str | Path, path: str | Path, num: int = 12, tile: int = 224, columns: int = 3) -> None:
    """Write one PNG with ``num`` images of the set at ``root``, each beside itself with masks, boxes and names."""
    root = Path(root)
    record = json.loads((root / "toy.json").read_text())
    height, width = record["arguments"]["size"]
    tile_h, tile_w = round(tile * height / max(height, width)), round(tile * width / max(height, width))
    cells = []
    for split, count in (("train", num - num // 2), ("val", num // 2)):
        name = _SPLITS[split][0]
        content = json.loads((root / "coco/annotations" / f"instances_{name}.json").read_text())
        for info in content["images"][:count]:
            photo = Image.open(root / "coco" / name / info["file_name"]).convert("RGB")
            marks = [a for a in content["annotations"] if a["image_id"] == info["id"]]
            cells.append((photo, _overlay(photo, marks, record, (tile_w, tile_h))))
    gap = 6
    pair_w, rows = 2 * tile_w + gap // 2, math.ceil(len(cells) / columns)
    sheet = Image.new("RGB", (columns * (pair_w + gap) + gap, rows * (tile_h + gap) + gap), "white")
    for i, (photo, marked) in enumerate(cells):
        x, y = gap + i % columns * (pair_w + gap), gap + i // columns * (tile_h + gap)
        sheet.paste(photo.resize((tile_w, tile_h), Image.Resampling.BICUBIC), (x, y))
        sheet.paste(marked, (x + tile_w + gap // 2, y))
    sheet.save(path, format="PNG")


def _overlay(photo: Image.Image, annotations: list[dict], record: dict, size: tuple[int, int]) -> Image.Image:
    tint = np.asarray(photo, np.float64) * 0.55
    for mark in annotations:
        mask = decode_rle(mark["segmentation"])
        tint[mask] = 0.35 * np.asarray(photo)[mask] + 0.65 * np.array(record["palette"][mark["category_id"]])
    picture = Image.fromarray(tint.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(10)
    for mark in annotations:
        colour = tuple(record["palette"][mark["category_id"]])
        scale = size[0] / photo.width
        x, y, w, h = (round(value * scale) for value in mark["bbox"])
        draw.rectangle((x, y, x + w - 1, y + h - 1), outline=colour)
        name = record["things"][mark["category_id"] - 1]
        text = draw.textbbox((x + 2, max(0, y - 12)), name, font=font)
        draw.rectangle((text[0] - 2, text[1] - 1, text[2] + 1, text[3] + 1), fill=colour)
        draw.text((x + 2, max(0, y - 12)), name, fill="white" if sum(colour) < 420 else "black", font=font)
    return picture
