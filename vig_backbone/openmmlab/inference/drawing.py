"""Pictures of results: masks, boxes, names and scores over the image, or classes over it with a legend beside it.

Drawn with OpenCV and Pillow. mmdet's visualizer goes through matplotlib, ten times slower (119 ms against 12 for ten
objects in 640 x 480 pixels on one CPU core), which a video or a slider shows, and draws in random shades, which differ
from picture to picture; mmseg's writes names over the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..draw_hook import LEGIBLE_SIDE
from .model import Color
from .results import Detections, LabelMap, Result

MASK_OPACITY, MAP_OPACITY = 0.45, 0.5
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
PIXELS_PER_LINE_WIDTH, PIXELS_PER_FONT_SIZE = 250, 50  # of the longer side
LEAST_FONT_SIZE = 12


class Painter:
    """Draws results of a model whose classes have these names and colours."""

    def __init__(self, classes: Sequence[str], palette: Sequence[Color]) -> None:
        self.classes = classes
        self.palette = np.array(palette, np.uint8).reshape(-1, 3)

    def draw(self, image: np.ndarray, result: Result, threshold: float = 0.0) -> np.ndarray:
        """A picture of a result for an image, both RGB [H, W, 3] uint8; detections below the threshold are left out.

        Small images are enlarged by a whole factor, so that names are legible. With a legend (segmentation) a picture
        is wider than the image, always by the same for one size of images.
        """
        H, W = image.shape[:2]
        factor = max(1, LEGIBLE_SIDE // max(H, W))
        image = cv2.resize(image, (W * factor, H * factor), interpolation=cv2.INTER_CUBIC) if factor > 1 else image
        if isinstance(result, LabelMap):
            return self._draw_label_map(image, result, factor)
        return self._draw_detections(image.copy(), result.above(threshold), factor)

    def _draw_detections(self, picture: np.ndarray, found: Detections, factor: int) -> np.ndarray:
        thickness = max(1, round(max(picture.shape) / PIXELS_PER_LINE_WIDTH))
        worst_first = range(len(found) - 1, -1, -1)
        for i in worst_first:
            color = tuple(map(int, self.palette[found.labels[i]]))
            if found.rles is not None:
                _draw_mask(picture, _decoded(found.rles[i], factor), color, thickness)
            x1, y1, x2, y2 = np.rint(found.boxes[i] * factor).astype(int).tolist()
            cv2.rectangle(picture, (x1, y1), (x2, y2), color, thickness)
        canvas = Image.fromarray(picture)
        draw = ImageDraw.Draw(canvas)
        for i in worst_first:
            text = f"{found.names[i]} {found.scores[i]:.2f}"
            corner = found.boxes[i, :2] * factor
            _draw_label(draw, text, corner, tuple(map(int, self.palette[found.labels[i]])), canvas.size)
        return np.asarray(canvas)

    def _draw_label_map(self, image: np.ndarray, found: LabelMap, factor: int) -> np.ndarray:
        labels = _enlarged(found.labels, factor)
        colors = self.palette[labels]
        picture = cv2.addWeighted(colors, MAP_OPACITY, np.ascontiguousarray(image), 1 - MAP_OPACITY, 0)
        legend = self._legend(found.shares(), *picture.shape[:2])
        return np.concatenate((picture, legend), axis=1)

    def _legend(self, shares: dict[int, float], height: int, width: int) -> np.ndarray:
        """Swatch, name and share of the classes that are there, the largest first, as many as fit: [height, ..., 3]."""
        font = _font(_font_size(height, width))
        line = round(font.size * 1.5)
        widest = max(font.getlength(_entry(name, 1.0)) for name in self.classes)
        strip = Image.new("RGB", (line * 2 + round(widest), height), WHITE)
        draw = ImageDraw.Draw(strip)
        fitting = max(1, (height - line // 2) // line)
        shown = list(shares.items())[: fitting if len(shares) <= fitting else fitting - 1]
        for row, (label, share) in enumerate(shown):
            top = line // 4 + row * line
            swatch = (line // 4, top, line // 4 + font.size, top + font.size)
            draw.rectangle(swatch, tuple(map(int, self.palette[label])), outline=BLACK)
            draw.text((line * 1.25, top), _entry(self.classes[label], share), BLACK, font)
        if len(shares) > len(shown):
            text = f"and {len(shares) - len(shown)} more"
            draw.text((line * 1.25, line // 4 + len(shown) * line), text, BLACK, font)
        return np.asarray(strip)


def _entry(name: str, share: float) -> str:
    return f"{name} {share:.1%}"


def _font_size(height: int, width: int) -> int:
    return max(LEAST_FONT_SIZE, max(height, width) // PIXELS_PER_FONT_SIZE)


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic and more; Pillow's own font is Latin alone."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _enlarged(labels: np.ndarray, factor: int) -> np.ndarray:
    """[H, W] -> [factor * H, factor * W]"""
    return labels if factor == 1 else labels.repeat(factor, 0).repeat(factor, 1)


def _decoded(rle: dict, factor: int) -> np.ndarray:
    from pycocotools import mask

    return _enlarged(mask.decode(rle), factor)


def _draw_mask(picture: np.ndarray, mask: np.ndarray, color: Color, thickness: int) -> None:
    """Tint the picture where the mask [H, W] is 1, and draw its outline."""
    x, y, w, h = cv2.boundingRect(mask)
    if w == 0 or h == 0:
        return
    inside = mask[y : y + h, x : x + w].astype(bool)
    part = picture[y : y + h, x : x + w]
    part[inside] = (part[inside] * (1 - MASK_OPACITY) + np.array(color) * MASK_OPACITY).astype(np.uint8)
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, outlines, -1, WHITE, max(1, thickness // 2))


def _draw_label(draw: ImageDraw.ImageDraw, text: str, corner: np.ndarray, color: Color, size: tuple[int, int]) -> None:
    """On a patch of the class's colour: above the box's corner where there is room, inside the picture in any case."""
    W, H = size
    font = _font(_font_size(H, W))
    width, height = round(font.getlength(text)) + 4, round(font.size * 1.3)
    x = int(np.clip(corner[0], 0, max(0, W - width)))
    y = int(np.clip(corner[1] - height if corner[1] >= height else corner[1], 0, max(0, H - height)))
    draw.rectangle((x, y, x + width, y + height), color)
    brightness = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    draw.text((x + 2, y), text, BLACK if brightness > 140 else WHITE, font)
