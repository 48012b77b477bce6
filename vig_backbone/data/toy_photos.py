"""The photos and the handwritten digits of the toy data, as scikit-image and scikit-learn ship them in their wheels.

Train and val never share a photo region or a digit.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_TRAIN_PART = 0.58  # train crops come from the left part of each photo, val crops from the rest
_TRAIN_DIGITS = 1400  # of 1,797 handwritten digits
_COLOUR_PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
_GREY_PHOTOS = {"brick.png": (178, 100, 78), "grass.png": (98, 146, 74), "gravel.png": (158, 146, 128)}  # name: tint


@lru_cache(maxsize=1)
def photos() -> list[Image.Image]:
    """All photos, RGB, in a fixed order. Raises ImportError without the ``toy`` extra."""
    try:
        from sklearn.datasets import load_sample_images

        # The files are read by path: skimage.data would ask its downloader.
        folder = Path(importlib.util.find_spec("skimage").origin).parent / "data"
    except (ImportError, AttributeError) as error:
        raise ImportError("the toy data needs scikit-image and scikit-learn: pip install 'vig-dense[toy]'") from error
    found = [Image.open(folder / name).convert("RGB") for name in _COLOUR_PHOTOS]
    for name, tint in _GREY_PHOTOS.items():
        found.append(ImageOps.colorize(Image.open(folder / name).convert("L"), "black", "white", mid=tint))
    return found + [Image.fromarray(image) for image in load_sample_images().images]


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digits as smooth glyphs [1797, 96, 96] (uint8, with a dark border), and their values."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = [Image.fromarray(np.pad(image * (255 / 16), 1).astype(np.uint8)) for image in digits.images]
    return np.stack([np.asarray(g.resize((96, 96), Image.Resampling.BICUBIC)) for g in small]), digits.target


def photo_crop(
    rng: np.random.Generator, split: str, height: int, width: int, photo: Image.Image | None = None
) -> np.ndarray:
    """A random crop [height, width, 3] in 0..1 from the part of a (random) photo that belongs to the split."""
    if photo is None:
        photo = photos()[rng.integers(len(photos()))]
    border = int(photo.width * _TRAIN_PART)
    left, right = (0, border) if split == "train" else (border, photo.width)
    crop_w = min(right - left, photo.height * width / height) * rng.uniform(0.65, 1.0)
    crop_h = crop_w * height / width
    x = left + rng.uniform(0, right - left - crop_w)
    y = rng.uniform(0, photo.height - crop_h)
    box = (x, y, min(x + crop_w, right), min(y + crop_h, photo.height))
    crop = np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC, box=box), np.float64) / 255
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def digit_glyph(rng: np.random.Generator, name: str, split: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
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
