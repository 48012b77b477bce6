"""What predictions leave on disk: pictures, videos, JSON lines, label maps."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
from PIL import Image

from ..errors import DataError
from .drawing import Painter
from .inputs import Source
from .job import Frame
from .results import Detections, LabelMap, Result
from .video import VideoWriter

FORMATS = ("jpg", "png")
JPEG_QUALITY = 92
OVERLAYS, LABEL_MAPS = "overlays", "label_maps"  # folders


class ResultWriter:
    """Writes results as they come; a context manager, as videos and the JSON file end with it.

    - folder/overlays/NAME.jpg or .png, of a video NAME.mp4;
    - folder/label_maps/NAME.png, of a video NAME/000000.png and so on: 8-bit class indices with the classes' colours as
      palette (16-bit without one for more than 256 classes);
    - a line of JSON for each image or frame.

    Args:
        painter: draws the pictures.
        json_file: for the lines of JSON, if any.
        threshold: detections below it appear nowhere.
    """

    def __init__(
        self,
        folder: Path,
        painter: Painter,
        *,
        overlays: bool = True,
        label_maps: bool = False,
        json_file: Path | None = None,
        threshold: float = 0.0,
        image_format: str = "jpg",
    ) -> None:
        self.folder, self.painter, self.threshold = folder, painter, threshold
        self.overlays, self.label_maps, self.image_format = overlays, label_maps, image_format
        self._video: tuple[Source, VideoWriter] | None = None
        try:
            self._json = None if json_file is None else _parents_made(json_file).open("w", encoding="utf-8")
        except OSError as error:
            raise DataError(f"{json_file}: cannot be written ({error.strerror})") from error

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_video()
        if self._json is not None:
            self._json.close()

    def write(self, frame: Frame, result: Result) -> None:
        """Raises DataError where a file cannot be written."""
        if isinstance(result, Detections):
            result = result.above(self.threshold)
        try:
            if self.overlays:
                self._write_overlay(frame, self.painter.draw(frame.image, result))
            if self.label_maps and isinstance(result, LabelMap):
                self._write_label_map(frame, result)
            if self._json is not None:
                self._json.write(json.dumps(_line(frame, result), ensure_ascii=False) + "\n")
        except OSError as error:
            raise DataError(f"{error.filename or self.folder}: cannot be written ({error.strerror})") from error

    def _write_overlay(self, frame: Frame, picture: np.ndarray) -> None:
        target = self.folder / OVERLAYS / frame.source.name
        if frame.rate is None:
            _write_picture(_parents_made(target.with_name(f"{target.name}.{self.image_format}")), picture)
            return
        if self._video is None or self._video[0] != frame.source:
            self._end_video()
            file = _parents_made(target.with_name(f"{target.name}.mp4"))
            self._video = frame.source, VideoWriter(file, frame.rate, picture.shape[:2])
        self._video[1].write(picture)

    def _end_video(self) -> None:
        if self._video is not None:
            self._video[1].close()
            self._video = None

    def _write_label_map(self, frame: Frame, result: LabelMap) -> None:
        name = frame.source.name if frame.number is None else f"{frame.source.name}/{frame.number:06}"
        image = Image.fromarray(result.labels)
        if result.labels.dtype == np.uint8:
            image.putpalette(self.painter.palette.tobytes())
        image.save(_parents_made(self.folder / LABEL_MAPS / f"{name}.png"))


def _line(frame: Frame, result: Result) -> dict[str, Any]:
    line: dict[str, Any] = {"image": str(frame.source.path), "name": frame.source.name}
    if frame.number is not None:
        line |= {"frame": frame.number, "time": round(frame.number / frame.rate, 4)}
    return line | result.to_dict()


def _write_picture(path: Path, picture: np.ndarray) -> None:
    encoded, data = cv2.imencode(path.suffix, picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not encoded:
        raise DataError(f"{path}: a picture of {picture.shape[1]} x {picture.shape[0]} pixels cannot be encoded")
    path.write_bytes(data.tobytes())


def _parents_made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
