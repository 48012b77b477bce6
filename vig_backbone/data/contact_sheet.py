"""A picture of what is in a toy data set: images, each beside itself with masks, boxes and names."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .rle import decode_rle

_GAP = 6  # pixels between the pairs


def draw_contact_sheet(root: str | Path, path: str | Path, num: int = 12, tile: int = 224, columns: int = 3) -> None:
    """Write one PNG with ``num`` images of the toy data at ``root``, marked and unmarked, each ``tile`` pixels long."""
    root = Path(root)
    record = json.loads((root / "toy.json").read_text())
    height, width = record["arguments"]["size"]
    size = tile_w, tile_h = round(tile * width / max(height, width)), round(tile * height / max(height, width))
    cells = [*_images(root / "coco", "train2017", num - num // 2), *_images(root / "coco", "val2017", num // 2)]
    pair_w, rows = 2 * tile_w + _GAP // 2, math.ceil(len(cells) / columns)
    sheet = Image.new("RGB", (columns * (pair_w + _GAP) + _GAP, rows * (tile_h + _GAP) + _GAP), "white")
    for i, (photo, marks) in enumerate(cells):
        x, y = _GAP + i % columns * (pair_w + _GAP), _GAP + i // columns * (tile_h + _GAP)
        sheet.paste(photo.resize(size, Image.Resampling.BICUBIC), (x, y))
        sheet.paste(_marked(photo, marks, record, size), (x + tile_w + _GAP // 2, y))
    sheet.save(path, format="PNG")


def _images(coco: Path, split: str, count: int) -> Iterator[tuple[Image.Image, list[dict]]]:
    """The first images of a split, with their annotations."""
    content = json.loads((coco / "annotations" / f"instances_{split}.json").read_text())
    for info in content["images"][:count]:
        photo = Image.open(coco / split / info["file_name"]).convert("RGB")
        yield photo, [a for a in content["annotations"] if a["image_id"] == info["id"]]


def _marked(photo: Image.Image, annotations: list[dict], record: dict, size: tuple[int, int]) -> Image.Image:
    tint = np.asarray(photo, np.float64) * 0.55
    for mark in annotations:
        mask = decode_rle(mark["segmentation"])
        tint[mask] = 0.35 * np.asarray(photo)[mask] + 0.65 * np.array(record["palette"][mark["category_id"]])
    picture = Image.fromarray(tint.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    draw, scale = ImageDraw.Draw(picture), size[0] / photo.width
    for mark in annotations:
        colour = tuple(record["palette"][mark["category_id"]])
        x, y, w, h = (round(value * scale) for value in mark["bbox"])
        draw.rectangle((x, y, x + w - 1, y + h - 1), outline=colour)
        _write_name(draw, (x + 2, max(0, y - 12)), record["things"][mark["category_id"] - 1], colour)
    return picture


def _write_name(draw: ImageDraw.ImageDraw, place: tuple[int, int], name: str, colour: tuple[int, int, int]) -> None:
    font = ImageFont.load_default(10)
    left, top, right, bottom = draw.textbbox(place, name, font=font)
    draw.rectangle((left - 2, top - 1, right + 1, bottom + 1), fill=colour)
    draw.text(place, name, fill="white" if sum(colour) < 420 else "black", font=font)
