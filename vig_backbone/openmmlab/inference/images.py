"""Image files of any kind as what models see: 8 bits, three channels, upright."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from ..errors import DataError


class ImageError(DataError):
    """One image or video that cannot be used; the message says why, and does not repeat its name."""


def read_image(path: str | Path) -> np.ndarray:
    """A file as RGB, [H, W, 3] uint8, turned as its EXIF orientation says.

    Decoded as mmcv's LoadImageFromFile does it, so that a prediction is the same as in a test: grey values are
    repeated, 16 bits are cut to 8, transparency is dropped.

    Raises:
        ImageError: not there, empty, damaged, or of an unknown format.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror})") from error
    if not data:
        raise ImageError("empty file (0 bytes)")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:  # more pixels than OpenCV's limit, for instance
        raise ImageError(f"cannot be decoded ({error.err or error})") from error
    if image is None:
        raise ImageError(f"truncated, damaged or no image ({len(data)} bytes)")
    return image[..., ::-1]


def as_rgb(image: np.ndarray) -> np.ndarray:
    """An array that a user gives, [H, W] or [H, W, 1 | 3 | 4] uint8, as RGB [H, W, 3].

    Raises:
        ImageError: for any other shape or type of numbers.
    """
    if image.dtype != np.uint8:
        raise ImageError(f"an array of {image.dtype}, expected uint8 (0 to 255)")
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or 0 in image.shape:
        raise ImageError(f"an array of shape {image.shape}, expected [H, W] or [H, W, 1, 3 or 4] in RGB order")
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[..., :3]
