"""Draw one scene of the toy data: lit objects with shadows on the crop of a photo, with exact masks."""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .toy_photos import digit_glyph, photo_crop, photos
from .toy_shapes import SHAPES

_SPLITS = ("train", "val")
_MIN_PIXELS = 30  # visible pixels that an object needs to be kept


@dataclass(frozen=True)
class Setting:
    """What a difficulty means: number of objects, size (share of the shorter side), rotation (degrees), visibility."""

    things: tuple[str, ...]
    count: tuple[int, int]
    size: tuple[float, float]
    rotation: float
    min_visible: float
    hues: tuple[float, ...] = ()  # one a class

    @property
    def hard(self) -> bool:
        """Objects of any colour, perhaps with a photo on them, cut by the border, on a background as vivid as they."""
        return not self.hues


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


def _base_colour(rng: np.random.Generator, label: int, setting: Setting) -> np.ndarray:
    if setting.hard:
        hue, saturation, value = rng.uniform(), rng.uniform(0.35, 1.0), rng.uniform(0.35, 1.0)
    else:
        hue = (setting.hues[label] + rng.normal(0, 0.012)) % 1
        saturation, value = rng.uniform(0.75, 0.95), rng.uniform(0.78, 1.0)
    if setting.things[label].startswith("digit"):  # dark enough for a bright glyph
        value *= 0.7
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value))


def _surface(
    rng: np.random.Generator, label: int, setting: Setting, split: str, u: np.ndarray, v: np.ndarray
) -> np.ndarray:
    """Unlit colours [h, w, 3] of an object, glyph included."""
    name = setting.things[label]
    card = name.startswith("digit")
    colour = _base_colour(rng, label, setting) * np.ones((*u.shape, 1))
    if setting.hard and rng.random() < 0.6:
        mix = rng.uniform(0.2, 0.4) if card else rng.uniform(0.3, 0.7)
        colour = (1 - mix) * colour + mix * photo_crop(rng, split, *u.shape)
    else:
        colour = colour * _texture(rng, u, v)[..., None]
    if card:
        glyph = digit_glyph(rng, name, split, u, v)[..., None]
        colour = (1 - glyph) * colour + glyph * rng.uniform(0.9, 1.0, 3)
    return colour


def _pose(
    rng: np.random.Generator, card: bool, setting: Setting, canvas: tuple[int, int]
) -> tuple[float, float, float, float]:
    """A random place of an object: centre x, y and radius in pixels, rotation in radians."""
    height, width = canvas
    share = math.exp(rng.uniform(*np.log(setting.size)))
    radius = max(share * min(canvas), 16 if card else 10) / 2
    margin = radius * (0.6 if setting.hard else 1.0)
    cx, cy = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
    # A six that stands on its head is a nine: digits turn by 45 degrees at most.
    limit = min(setting.rotation, 45.0) if card else setting.rotation
    return cx, cy, radius, math.radians(rng.uniform(-limit, limit))


def _make_object(
    rng: np.random.Generator, label: int, setting: Setting, split: str, canvas: tuple[int, int], light: float
) -> _Object:
    """One object at a random place. ``light`` is the direction, in radians, from which the scene is lit."""
    name = setting.things[label]
    cx, cy, radius, angle = _pose(rng, name.startswith("digit"), setting, canvas)
    reach = radius * 1.25 + 4
    window = (
        slice(max(0, int(cy - reach)), min(canvas[0], int(cy + reach) + 1)),
        slice(max(0, int(cx - reach)), min(canvas[1], int(cx + reach) + 1)),
    )
    y, x = (grid + 0.5 for grid in np.mgrid[window])
    dx, dy = (x - cx) / radius, (y - cy) / radius
    u, v = math.cos(angle) * dx + math.sin(angle) * dy, math.cos(angle) * dy - math.sin(angle) * dx
    distance = SHAPES[name.partition("_")[0]](u, v) * radius  # in pixels

    towards_light = dx * math.cos(light) + dy * math.sin(light)
    rim = np.clip(-distance / (0.08 * radius + 1), 0, 1)
    lit = (1 + 0.2 * towards_light) * (0.72 + 0.28 * rim)
    colour = _surface(rng, label, setting, split, u, v) * lit[..., None]
    offset = [round(-math.sin(light) * 0.08 * radius), round(-math.cos(light) * 0.08 * radius)]
    shadow = np.clip(0.5 - np.roll(distance, offset, axis=(0, 1)) / (0.12 * radius + 2), 0, 1)
    return _Object(label, window, np.clip(0.5 - distance, 0, 1), np.clip(colour, 0, 1), shadow)


def _place_objects(
    rng: np.random.Generator, first: int, setting: Setting, split: str, canvas: tuple[int, int], light: float
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


def _background(
    rng: np.random.Generator, seeds: list[int], index: int, split: str, canvas: tuple[int, int], hard: bool
) -> np.ndarray:
    """A photo crop [H, W, 3] in 0..1, in the easy set paler than the objects."""
    deal, card = divmod(index, len(photos()))  # photos are dealt like cards: each once before any again
    order = np.random.default_rng([*seeds, deal, 1]).permutation(len(photos()))
    picture = photo_crop(rng, split, *canvas, photo=photos()[order[card]])
    if not hard:
        picture = 0.3 * picture.mean(axis=2, keepdims=True) + 0.7 * picture
    return picture * rng.uniform(0.8, 1.05)


def draw_scene(setting: Setting, index: int, split: str, canvas: tuple[int, int], seed: int) -> Scene:
    """Scene ``index`` of ``split``, of ``canvas`` = (height, width) pixels: a function of its arguments alone."""
    seeds = [seed, _SPLITS.index(split)]
    rng = np.random.default_rng([*seeds, index])
    picture = _background(rng, seeds, index, split, canvas, setting.hard)
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
