"""Pictures of images with boxes, masks and label maps, for pages and for files."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
GAP = 8  # pixels between pictures that stand side by side
UNLABELLED = (0, 0, 0)


@dataclass(frozen=True)
class View:
    """An image and what is marked in it.

    image: [H, W, 3] uint8, RGB. label_map: [H, W] integers; what is no class is left out.
    boxes: [N, 4] x1, y1, x2, y2; labels: [N]; masks: [N, H, W] bool; scores: [N].
    """

    image: np.ndarray
    label_map: np.ndarray | None = None
    boxes: np.ndarray | None = None
    labels: np.ndarray | None = None
    masks: np.ndarray | None = None
    scores: np.ndarray | None = None


def palette_of(classes: Sequence[str], palette: Sequence[Colour] | None = None) -> list[Colour]:
    """Colours of the classes: the data set's own, or hues a golden ratio apart."""
    if palette and len(palette) >= len(classes) and not isinstance(palette, str):
        return [tuple(map(int, colour)) for colour in palette]
    hues = [int(255 * (i * 0.618034 % 1)) for i in range(len(classes))]
    return [Image.new("HSV", (1, 1), (hue, 190, 230)).convert("RGB").getpixel((0, 0)) for hue in hues]


def draw(view: View, classes: Sequence[str], palette: Sequence[Colour], side: int = 480) -> Image.Image:
    """The image with its marks, the longer side `side` pixels long."""
    H, W = view.image.shape[:2]
    scale = side / max(H, W)
    size = max(1, round(W * scale)), max(1, round(H * scale))
    pixels = np.asarray(Image.fromarray(view.image).resize(size, Image.Resampling.BICUBIC))
    if view.label_map is not None:
        pixels = _tinted(pixels, _colours(_resized(view.label_map, size), palette))
    if view.masks is not None:
        for mask, label in zip(view.masks, view.labels):
            pixels = np.where(_resized(mask, size)[..., None], _tinted(pixels, _colour(palette, label)), pixels)
    picture = Image.fromarray(pixels.astype(np.uint8))
    if view.boxes is not None:
        _draw_boxes(picture, view, classes, palette, scale)
    return picture


def _resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W] -> [h, w], the nearest pixel; size: w, h."""
    rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for m, n in zip(values.shape, size[::-1]))
    return values[rows][:, columns]


def _tinted(pixels: np.ndarray, colours: np.ndarray, share: float = 0.55) -> np.ndarray:
    return (1 - share) * pixels + share * colours


def _colour(palette: Sequence[Colour], label: int) -> np.ndarray:
    return np.array(palette[int(label) % len(palette)] if palette else (200, 200, 200))


def _colours(label_map: np.ndarray, palette: Sequence[Colour]) -> np.ndarray:
    """[H, W] -> [H, W, 3]"""
    table = np.array([*palette, UNLABELLED])
    valid = (label_map >= 0) & (label_map < len(palette))
    return table[np.where(valid, label_map, len(palette))]


def _draw_boxes(
    picture: Image.Image, view: View, classes: Sequence[str], palette: Sequence[Colour], scale: float
) -> None:
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for i in range(len(view.boxes) - 1, -1, -1):  # the most certain on top
        x1, y1, x2, y2 = (float(value) * scale for value in view.boxes[i])
        label = int(view.labels[i])
        colour = tuple(_colour(palette, label).tolist())
        pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=2)
        name = classes[label] if 0 <= label < len(classes) else str(label)
        text = name if view.scores is None else f"{name} {view.scores[i]:.2f}"
        _, _, width, height = pen.textbbox((0, 0), text, font=font)
        x, y = min(max(0, x1), max(0, picture.width - width - 4)), max(0, y1 - height - 3)
        pen.rectangle((x, y, x + width + 3, y + height + 2), fill=colour)
        pen.text((x + 2, y), text, fill="black" if sum(colour) > 380 else "white", font=font)


def side_by_side(
    pictures: Sequence[Image.Image], titles: Sequence[str] = (), columns: int | None = None
) -> Image.Image:
    """Pictures in rows of `columns` (by default one row), on white, each with its title above it."""
    columns = columns or len(pictures)
    font, band = ImageFont.load_default(13), 20 if titles else 0
    width, height = (max(getattr(picture, name) for picture in pictures) for name in ("width", "height"))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + band + GAP) - GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        x, y = i % columns * (width + GAP), i // columns * (height + band + GAP)
        sheet.paste(picture, (x, y + band))
        if titles:
            pen.text((x + 2, y + 2), titles[i], fill="black", font=font)
    return sheet


def data_url(picture: Image.Image, lossless: bool = False) -> str:
    """A picture for the `src` of a page that has no other files: JPEG, or PNG without loss."""
    buffer = io.BytesIO()
    picture.save(buffer, **(dict(format="PNG", optimize=True) if lossless else dict(format="JPEG", quality=82)))
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
