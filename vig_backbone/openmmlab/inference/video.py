"""Frames of video files, and videos of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from ..errors import DataError
from .images import ImageError

CODEC = "mp4v"  # MPEG-4: the published builds of OpenCV have no encoder for H.264
DEFAULT_RATE = 25.0  # frames a second, of files that do not say
WHOLE = 0.9  # of the frames that a file announces, which is often a guess


class VideoReader:
    """The frames of a file, RGB [H, W, 3] uint8; `rate` in frames a second.

    Raises:
        ImageError: no video that OpenCV can decode; while reading, if it ends long before the announced end.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ImageError("no such file")
        self._capture = cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise ImageError(f"cannot be opened as a video ({path.stat().st_size} bytes; damaged, or an unknown codec)")
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate < 1000 else DEFAULT_RATE

    def __iter__(self) -> Iterator[np.ndarray]:
        count = 0
        announced = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        try:
            while True:
                read, frame = self._capture.read()
                if not read:
                    break
                count += 1
                yield frame[..., ::-1]
        finally:
            self._capture.release()
        if count < max(1, WHOLE * announced):
            raise ImageError(f"{count} frames could be read, {announced:.0f} are announced: truncated or damaged")


class VideoWriter:
    """An mp4 of pictures of one size, RGB [H, W, 3] uint8."""

    def __init__(self, path: Path, rate: float, size: tuple[int, int]) -> None:
        self.size = size
        self._writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*CODEC), rate, size[::-1])
        if not self._writer.isOpened():
            raise DataError(f"{path}: this OpenCV cannot write an mp4 there; --no-overlay leaves videos out")

    def write(self, picture: np.ndarray) -> None:
        if picture.shape[:2] != self.size:
            raise DataError(f"a frame of {picture.shape[:2]} in a video of {self.size} pixels")
        self._writer.write(np.ascontiguousarray(picture[..., ::-1]))

    def close(self) -> None:
        self._writer.release()
